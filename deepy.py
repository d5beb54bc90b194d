#!/usr/bin/env python
"""Check a configuration, then run a script with it, in as many processes as asked for.

python deepy.py SCRIPT [-d DIR] a.yml b.yml [-o key=value ...] [--check]
"""

import sys

from megatron.script import exit_status


def main(argv: list[str]) -> int:
    def work() -> int:
        from megatron.launcher import main as launch

        return launch(argv)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
