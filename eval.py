#!/usr/bin/env python
"""Measure a trained model: loss and bits per byte of text files, tasks of lm-evaluation-harness, what it makes of a long context.

python deepy.py eval.py -d configs a.yml -o 'eval_text_files=[data/sotu/test.txt]'
python deepy.py eval.py -d configs a.yml --eval_tasks piqa arc_easy [--eval_data DIR] [-o eval_limit=100]
python eval.py -d configs a.yml -o 'eval_text_files=[test.txt]' [-o eval_stride=64] [--eval_results_prefix runs/a]

The model is the newest checkpoint in `load`, else in `save`.
"""

import logging
import os
import sys

from megatron.script import exit_status


def main(argv: list[str]) -> int:
    def work() -> None:
        from megatron.inference.processes import take_part
        from megatron.launcher import config_from_argv

        loaded = config_from_argv(argv)
        replicas = bool(loaded.config.evaluation.eval_tasks)
        if not take_part(loaded.config.parallel, loaded.config.launcher, replicas=replicas):
            return
        from megatron.data.progress import build_reporter
        from megatron.inference.evaluation import evaluate
        from megatron.monitor.console import configure_logging
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        rank = int(os.environ.get("RANK", "0"))
        console = configure_logging(rank=rank)
        logging.getLogger("megatron.kernels").setLevel(logging.WARNING)
        evaluate(loaded.config, console, build_reporter(quiet=rank > 0))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
