#!/usr/bin/env python
"""Rerun the claims of the papers in miniature: train every arm of the protocol, compare them, and write the document.

python tools/reproduce.py [--tier full|quick] [--jobs N]     what has been run is not run again; Ctrl-C stops, the same command goes on
python tools/reproduce.py --report                           writes the document from the runs that exist
python tools/reproduce.py --list                             shows every run and its state
python tools/reproduce.py --again sotu/structmoe/main-...    trains one run once more and compares its numbers with the record
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.script import INTERRUPTED_STATUS, at_least_one, exit_status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Rerun the claims of the papers in miniature. Each run uses one core. What has been run is not run again."
    )
    parser.add_argument(
        "--tier",
        default="full",
        help="full (an hour), long (the core arms with three times the steps; as long again) or quick (under 15 minutes on two cores); "
        "default: %(default)s",
    )
    parser.add_argument("--jobs", type=at_least_one, default=2, metavar="N", help="runs side by side, one core each (default: %(default)s)")
    parser.add_argument("--protocol", type=Path, default=Path("docs/reproduction/protocol.yml"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), metavar="FOLDER", help="where runs go (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="FOLDER", help="where prepared texts go (default: %(default)s)")
    out = "where the document goes (default: docs for the tiers full and long, else the folder of the runs)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="train nothing; write the document from the runs that exist")
    what.add_argument("--list", action="store_true", help="train nothing; show every run and its state")
    what.add_argument("--again", metavar="RUN", help="train one finished run once more, elsewhere, and compare its numbers")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> int:
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        from megatron.analysis.reproduce.command import Command, reproduce

        try:
            return reproduce(Command(**vars(options)))
        except KeyboardInterrupt:
            print("\nInterrupted. Runs that had begun saved their state. The same command goes on from there.", file=sys.stderr)
            return INTERRUPTED_STATUS

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
