"""Prepares text for training. `python prepare_data.py` prepares the default corpus; `--help` shows the options."""

from __future__ import annotations

import sys

from megatron.script import INTERRUPTED_STATUS, exit_status


def main(arguments: list[str]) -> int:
    def work() -> int | None:
        from megatron.data.preprocessing.prepare import prepare
        from megatron.data.preprocessing.prepare_arguments import parse
        from megatron.data.preprocessing.prepared import describe
        from megatron.data.progress import build_reporter

        options = parse(arguments)
        try:
            prepared = prepare(options, build_reporter())
        except KeyboardInterrupt:
            print("\nInterrupted: nothing was prepared. What was downloaded is kept: the same command continues from there.", file=sys.stderr)
            return INTERRUPTED_STATUS
        print(describe(prepared), flush=True)
        return None

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
