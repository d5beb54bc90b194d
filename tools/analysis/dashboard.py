#!/usr/bin/env python
"""Watch runs while they train: losses, speed, experts and alerts of one or several runs on one page.

python tools/analysis/dashboard.py RUN_DIR [RUN_DIR ...] --serve [--port N]       a page at http://127.0.0.1:8050/
python tools/analysis/dashboard.py RUN_DIR [RUN_DIR ...] --output page.html       a file that is written again every 10 seconds
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 1 to 86400, not '{text}'")
    return number


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, not '{text}'")
    return int(text)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Watch runs while they train. The runs need not know of it: it reads their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the folder that a run saves to, or its metrics.jsonl")
    parser.add_argument("--serve", action="store_true", help="answer on 127.0.0.1; this is the default without --output")
    parser.add_argument("--port", type=port, default=8050, metavar="N", help="port of --serve; 0: any free one (default: 8050)")
    parser.add_argument("--output", metavar="PAGE", help="write the page to this file, which needs no server and no network")
    parser.add_argument("--every", type=seconds, default=10.0, metavar="SECONDS", help="time between two looks at the runs (default: 10)")
    parser.add_argument("--once", action="store_true", help="with --output: write the page once and end")
    options = parser.parse_args(argv)
    if options.serve and options.output is not None:
        parser.error("--serve and --output exclude each other: start the command twice")
    if options.once and options.output is None:
        parser.error("--once needs --output PAGE")
    return options


def main(argv: list[str]) -> int:
    options = arguments(argv)

    def work() -> None:
        from megatron.analysis.dashboard.serve import Dashboard, open_runs, serve, write_repeatedly

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        dashboard = Dashboard(open_runs(options.runs), every=options.every)
        if options.output is None:
            with contextlib.suppress(KeyboardInterrupt):  # it is the way to stop it
                serve(dashboard, port=options.port)
            return
        again = "" if options.once else f" every {options.every:g} s. Ctrl-C stops it; the runs go on"
        print(f"Writing {options.output}{again}.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            write_repeatedly(dashboard, Path(options.output), once=options.once)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
