"""The arguments that tools/datasets/preprocess_data*.py share, by GPT-NeoX's names."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.data.input.bad_input import add_format_option, add_on_error_option
from megatron.data.preprocessing.preprocess import PreprocessOptions
from megatron.data.tokenizer import TYPES


def dataset_impl(value: str) -> str:
    if value != "mmap":
        raise argparse.ArgumentTypeError(f"{value!r}: only mmap is written, the .bin/.idx pair that training reads")
    return value


def add_input_options(parser: argparse.ArgumentParser, default_key: str) -> None:
    group = parser.add_argument_group("input data")
    add = group.add_argument
    add(
        "--input",
        required=True,
        help="files, folders and patterns of them, separated by commas: .jsonl, .json, .txt, .parquet, packed or in archives; - is standard input",
    )
    add(
        "--jsonl-keys",
        nargs="+",
        default=[default_key],
        metavar="KEY",
        help="keys of each record to prepare, each to files of its own (default: %(default)s)",
    )
    add("--num-docs", type=int, metavar="N", help="number of documents in the input, if known; progress is shown as a share of it")
    add_format_option(parser)
    add_on_error_option(parser)


def add_text_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer-type", required=True, choices=TYPES)
    add("--vocab-file", help="the tokenizer's file, or a folder or a name if its type takes one")
    add("--merge-file", help="merges.txt of GPT2BPETokenizer")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--ftfy", action="store_true", help="first repair the text with the package ftfy")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output data").add_argument
    add("--output-prefix", required=True, metavar="P", help="start P of the output paths P_KEY_document.bin and .idx")
    add("--dataset-impl", type=dataset_impl, default="mmap", metavar="mmap", help="storage format (only mmap exists)")
    add = parser.add_argument_group("runtime").add_argument
    add("--workers", type=int, default=1, metavar="N", help="processes that encode, one thread each; 1 is this process (default: %(default)s)")
    add("--log-interval", type=int, default=100, metavar="N", help="documents between updates of the progress display (default: %(default)s)")


def common_options(values: dict[str, Any]) -> PreprocessOptions:
    """The options from the parsed arguments."""
    return PreprocessOptions(
        inputs=(values["input"],),
        keys=tuple(values["jsonl_keys"]),
        output_prefix=values["output_prefix"],
        workers=values["workers"],
        num_docs=values["num_docs"],
        log_interval=values["log_interval"],
        on_error=values["on_error"],
        input_format=values["input_format"],
    )
