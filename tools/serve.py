#!/usr/bin/env python
"""Serve a trained model: OpenAI's API over HTTP, and a page that shows the experts of each token.

python tools/serve.py -d configs quickstart.yml [-o serve_port=8000 ...]
python deepy.py tools/serve.py -d configs quickstart.yml

The model is the newest checkpoint in `load`, else in `save`. docs/serving.md says what the server takes and answers. Ctrl-C or SIGTERM stops it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.script import exit_status


def main(argv: list[str]) -> int:
    def work() -> None:
        from megatron.launcher import config_from_argv

        loaded = config_from_argv(argv)
        if int(os.environ.get("RANK", "0")) > 0:
            return  # the first process has the whole model
        from megatron.inference.serve.server import serve
        from megatron.monitor.console import configure_logging

        console = configure_logging(rank=0)
        logging.getLogger("megatron.kernels").setLevel(logging.WARNING)
        serve(loaded.config, console)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
