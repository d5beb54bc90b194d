#!/usr/bin/env python
"""List the weights of a checkpoint, or show where two checkpoints differ. Reads checkpoints of this program and of GPT-NeoX, and Hugging Face models.

python tools/ckpts/inspect_checkpoints.py runs/quickstart
python tools/ckpts/inspect_checkpoints.py runs/quickstart/global_step800 runs/quickstart/global_step1100

The exit status is 1 if the two differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="List the weights of a checkpoint, or show where two checkpoints differ.")
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint, the directory of a run (its latest checkpoint), or the directory of a Hugging Face model"
    )
    parser.add_argument("other", type=Path, nargs="?", help="another checkpoint to compare with, weight by weight")
    options = parser.parse_args(argv)

    def work() -> int:
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        from megatron.convert.inspection import differences, listing, open_any

        held = open_any(options.checkpoint)
        if options.other is not None:
            found = list(differences(held, open_any(options.other)))
            print("\n".join(found) or "The weights are the same, bit for bit.")
            return int(bool(found))
        print("\n".join([str(held.path), *held.facts, ""]))
        rows = [(weight.name, str(list(weight.shape)), weight.dtype, weight.bytes) for weight in listing(held)]
        widths = [max((len(str(row[column])) for row in rows), default=0) for column in range(3)]
        for name, shape, dtype, size in rows:
            print(f"{name:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  {size:>15,}")
        print(f"\n{len(rows)} weights, {sum(row[3] for row in rows):,} bytes")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
