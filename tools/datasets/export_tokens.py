#!/usr/bin/env python
"""Write the tokens of a .bin/.idx pair in the format of another program, in a new folder:

python tools/datasets/export_tokens.py datatrove data/mine/train_text_document --output exported/

Megatron-Core reads the pair as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def main(arguments: list[str]) -> int:
    from megatron.data.formats.exporting import WRITERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=WRITERS, metavar="FORMAT", help=f"the format to write: {', '.join(WRITERS)}")
    parser.add_argument("prefix", metavar="PREFIX", help="path of the pair; with or without .bin or .idx at its end")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the folder to make")
    options = parser.parse_args(arguments)

    def work() -> None:
        from megatron.data.formats.exporting import export_tokens
        from megatron.data.progress import build_reporter

        prefix = options.prefix.removesuffix(".bin").removesuffix(".idx")
        documents, tokens = export_tokens(options.format, prefix, options.output, build_reporter())
        print(f"{options.output}: {documents:,} documents, {tokens:,} tokens")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
