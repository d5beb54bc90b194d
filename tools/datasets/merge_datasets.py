#!/usr/bin/env python
"""Merge all .bin/.idx pairs of a folder into one pair, in natural order of their names.

python tools/datasets/merge_datasets.py --input FOLDER --output-prefix PREFIX
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Merge all .bin/.idx pairs of a folder into one pair, in natural order of their names (part-2 before part-10)."
    )
    parser.add_argument("--input", required=True, type=Path, metavar="FOLDER", help="the folder that holds the pairs")
    parser.add_argument("--output-prefix", required=True, type=Path, metavar="PREFIX", help="path of the merged pair without .bin/.idx")
    options = parser.parse_args(argv)

    def work() -> None:
        from megatron.data.preprocessing.merge import merge
        from megatron.data.progress import build_reporter

        merged = merge(options.input, options.output_prefix, build_reporter())
        print("\n".join(f"{number}. {prefix}" for number, prefix in enumerate(merged.inputs, start=1)))
        print(f"{options.output_prefix}: {merged.documents:,} documents, {merged.tokens:,} tokens")
        for notice in merged.notices:
            print(f"notice: {notice}")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
