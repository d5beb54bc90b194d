#!/usr/bin/env python
"""Count the documents and tokens of .bin/.idx pairs.

python tools/datasets/dataset_token_count.py PREFIX [PREFIX ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def table(counts: list[tuple[str, int, int]]) -> str:
    """A table with a line for each (name, documents, tokens). If there are several, a last line has their sums."""
    if len(counts) > 1:
        counts = [*counts, ("total", sum(documents for _, documents, _ in counts), sum(tokens for _, _, tokens in counts))]
    rows = [("", "documents", "tokens"), *((name, f"{documents:,}", f"{tokens:,}") for name, documents, tokens in counts)]
    first, second, third = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{name:{first}}  {documents:>{second}}  {tokens:>{third}}" for name, documents, tokens in rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Count the documents and tokens of .bin/.idx pairs.")
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a pair; with or without .bin or .idx at its end")
    options = parser.parse_args(argv)

    def work() -> None:
        from megatron.data.indexed import IndexedDataset

        prefixes = [prefix.removesuffix(".bin").removesuffix(".idx") for prefix in options.prefixes]
        datasets = [IndexedDataset(prefix) for prefix in prefixes]
        print(table([(str(dataset.prefix), len(dataset.document_ends), dataset.num_tokens) for dataset in datasets]))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
