"""Prepares text for training. `python prepare_data.py` prepares the default corpus; `--help` shows the options."""

from __future__ import annotations

import sys

from megatron.script import INTERRUPTED_STATUS, exit_status


def main(arguments: list[str]) -> int:
    def work() -> int | None:
        from megatron.data.parts.by_file import describe_parts, is_by_file, prepare_by_file
        from megatron.data.parts.plan import describe_plan, plan
        from megatron.data.preprocessing.prepare import prepare
        from megatron.data.preprocessing.prepare_arguments import parse
        from megatron.data.preprocessing.prepared import Prepared, describe
        from megatron.data.progress import build_reporter

        options = parse(arguments)
        by_file = is_by_file(options)
        if options.plan:
            print(describe_plan(plan(options, build_reporter(), by_file=by_file), as_json=options.json), flush=True)
            return None
        try:
            done = (prepare_by_file if by_file else prepare)(options, build_reporter())
        except KeyboardInterrupt:
            kept = "The parts and downloads that are complete are kept" if by_file else "What was downloaded is kept"
            print(f"\nInterrupted: nothing was prepared. {kept}: the same command continues from there.", file=sys.stderr)
            return INTERRUPTED_STATUS
        print(describe(done) if isinstance(done, Prepared) else describe_parts(done), flush=True)
        return None

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
