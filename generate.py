#!/usr/bin/env python
"""Continue text with a trained model.

python deepy.py generate.py -d configs a.yml [-i prompts.txt] [--sample_output_file samples.txt] [-o temperature=0.8 ...]
python generate.py -d configs a.yml [-o text_gen_type=interactive ...]

Prompts come from `sample_input_file`, from the person at the terminal, or there are none (`text_gen_type`). The model is the newest checkpoint
in `load`, else in `save`.
"""

import contextlib
import logging
import os
import sys

from megatron.script import exit_status


def main(argv: list[str]) -> int:
    def work() -> None:
        from megatron.inference.processes import take_part
        from megatron.launcher import config_from_argv

        loaded = config_from_argv(argv)
        if not take_part(loaded.config.parallel, loaded.config.launcher):
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 -- line editing for input()

        from megatron.inference.session import generate
        from megatron.monitor.console import configure_logging

        console = configure_logging(rank=int(os.environ.get("RANK", "0")))
        logging.getLogger("megatron.kernels").setLevel(logging.WARNING)
        generate(loaded.config, console, input, terminal=sys.stdin.isatty())

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
