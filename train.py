#!/usr/bin/env python
"""Train a model.

python deepy.py train.py -d configs a.yml b.yml [-o key=value ...]    one or several processes
python train.py -d configs a.yml b.yml [-o key=value ...]             this process alone
"""

import sys

from megatron.script import exit_status


def main(argv: list[str]) -> int:
    def work() -> int:
        from megatron.launcher import config_from_argv

        loaded = config_from_argv(argv)
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        from megatron.training.run import train

        if loaded.config.evaluation.eval_tasks_interval is None:
            return train(loaded).exit_status
        from megatron.inference.harness.training import task_callbacks

        return train(loaded, task_callbacks).exit_status

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
