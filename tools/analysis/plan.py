#!/usr/bin/env python
"""Plan a training run on a cluster: memory, messages and time of a step for the configuration's layout, and the best layout. Needs no GPU.

python tools/analysis/plan.py CONFIG [CONFIG ...] --gpus 64 --gpu h100-80gb [--skew 1.2] [-o key=value ...] [--json FILE]
python tools/analysis/plan.py --calibration
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import CONFIGURATION_STATUS, exit_status

MOST = 1 << 20
PLAIN_WIDTH = 220  # of the tables when they go to a file or pipe


def whole(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"must be a whole number, at most {MOST:,}, not '{text}'")
    return int(text)


def at_least_one(text: str) -> int:
    if whole(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="configuration files, as for deepy.py")
    parser.add_argument("-d", "--conf-dir", type=Path, help="folder of the configuration files")
    parser.add_argument(
        "-o", "--override", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as for deepy.py; may be repeated"
    )
    parser.add_argument("--gpus", type=at_least_one, help="number of GPUs, one process each")
    parser.add_argument("--gpu", metavar="NAME", help="a100-80gb, h100-80gb, h200-141gb, or a file of that form (megatron/analysis/plan/machines)")
    parser.add_argument("--gpus-per-node", type=at_least_one, metavar="N", help="GPUs of a node (default: as the machine's file says, 8)")
    parser.add_argument(
        "--vocab", type=at_least_one, metavar="N", help="tokens of the vocabulary (default: from the tokenizer or the file's first lines)"
    )
    parser.add_argument("--skew", type=float, default=1.0, metavar="X", help="rows of the fullest process over the mean (default: 1.0, even routing)")
    parser.add_argument("--stack", default="this", metavar="NAME", help="software: this, megatron-core, fsdp, fsdp-grouped, megablocks, unfused")
    parser.add_argument("--layouts", type=whole, default=15, metavar="N", help="layouts in the table (default: 15); 0: search none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    parser.add_argument("--calibration", action="store_true", help="predict measured runs of others, and say the error of each")
    options = parser.parse_args(argv)
    if not options.calibration and not (options.configs and options.gpus and options.gpu):
        parser.error("give a CONFIG, --gpus and --gpu; or --calibration alone")
    return options


def main(argv: list[str]) -> int:
    options = arguments(argv)

    def work() -> int | None:
        from rich.console import Console

        from megatron.analysis.plan.command import Request, calibrate, plan
        from megatron.analysis.plan.machine import PlanError

        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, soft_wrap=True)
        values = vars(options)
        try:
            if values.pop("calibration"):
                calibrate(console)
            else:
                plan(Request(**values), console)
        except PlanError as error:
            print(error, file=sys.stderr)
            return CONFIGURATION_STATUS
        return None

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
