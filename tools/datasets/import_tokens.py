#!/usr/bin/env python
"""Turn a corpus that another program has tokenised into a .bin/.idx pair, and compare the two token for token:

python tools/datasets/import_tokens.py datatrove tokens/ --output-prefix data/mine -t HFTokenizer -v tokenizer.json
python tools/datasets/import_tokens.py olmo part-0.npy --output-prefix data/mine --vocab-size 100278 --eod 100257 --borders eod

The tokenizer (or --vocab-size) says which ids are allowed and which type the pair has: the one that preprocess_data.py gives it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def parse(arguments: list[str]) -> argparse.Namespace:
    from megatron.data.formats.importing import BORDERS, FORMATS
    from megatron.data.formats.source import INTEGERS
    from megatron.data.tokenizer import TYPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("format", choices=FORMATS, metavar="FORMAT", help=f"what wrote the tokens: {', '.join(FORMATS)}")
    add("inputs", nargs="+", metavar="INPUT", help="files or folders; the files of a folder are taken in natural order")
    add("--output-prefix", required=True, metavar="P", help="path of the pair without .bin/.idx")
    add("-t", "--tokenizer-type", choices=TYPES, metavar="TYPE", help=f"the tokenizer of the tokens: one of {', '.join(TYPES)}")
    add("-v", "--vocab-file", metavar="FILE", help="the tokenizer's file")
    add("-m", "--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    add("--vocab-size", type=int, metavar="N", help="the number of ids, if there is no tokenizer at hand")
    add("--eod", type=int, metavar="ID", help="the end-of-document token (default: the tokenizer's)")
    add(
        "--borders",
        choices=BORDERS,
        help="where documents end: file = as the files say (default); eod = after each end-of-document token; bod = before each (default for llm.c)",
    )
    add("--append-eod", action="store_true", help="end each document with the end-of-document token, if it does not end so already")
    add("--dtype", choices=INTEGERS, help="type of the stored tokens, if the files do not say it (default: the smallest unsigned one that fits)")
    add("--column", metavar="NAME", help="the column of MDS, or the key of litdata's items, that holds the tokens")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="read everything again and compare it (default: yes)")
    options = parser.parse_args(arguments)
    if (options.vocab_size is None) == (options.tokenizer_type is None):
        parser.error("give the tokenizer of the tokens (-t TYPE -v FILE), or --vocab-size N, but not both")
    if options.vocab_size is not None and options.vocab_size < 1:
        parser.error(f"--vocab-size {options.vocab_size}: give 1 or more")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)

    def work() -> None:
        import numpy as np

        from megatron.data.formats.importing import ImportOptions, import_tokens
        from megatron.data.progress import build_reporter
        from megatron.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(options.tokenizer_type, options.vocab_file, options.merge_file) if options.tokenizer_type is not None else None
        eod = options.eod if options.eod is not None or tokenizer is None else tokenizer.eod
        given = ImportOptions(
            format=options.format,
            inputs=tuple(options.inputs),
            output_prefix=options.output_prefix,
            vocab_size=options.vocab_size if tokenizer is None else tokenizer.vocab_size,
            eod=eod,
            borders=options.borders,
            append_eod=options.append_eod,
            check=options.check,
            dtype=np.dtype(options.dtype).newbyteorder("<") if options.dtype else None,
            column=options.column,
        )
        imported = import_tokens(given, build_reporter())
        print("\n".join(f"{prefix}.bin and .idx" for prefix in imported.prefixes))
        print("\n".join([f"{imported.documents:,} documents, {imported.tokens:,} tokens", *imported.notes]))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
