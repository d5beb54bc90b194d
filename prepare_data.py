"""Text to training data: `python prepare_data.py` prepares the default corpus, `--help` shows the rest."""

from __future__ import annotations

import argparse
import sys

from megatron.data.bad_input import add_on_error_option
from megatron.data.corpora import CORPORA, TEST_FRACTION, VALID_FRACTION
from megatron.data.indexed import DatasetError
from megatron.data.prepare import PrepareOptions, describe, prepare
from megatron.data.progress import build_reporter
from megatron.data.tokenizer import TYPES, TokenizerError


def parse(arguments: list[str]) -> PrepareOptions:
    parser = argparse.ArgumentParser(description="Prepare text for training: vocabulary, .bin/.idx files and held-out text, in DIRECTORY/NAME.")
    defaults = PrepareOptions()
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=f"a corpus ({', '.join(CORPORA)}; default sotu) or files and folders of .txt and .jsonl, compressed or not",
    )
    add("-d", "--directory", default=defaults.directory, help="where the folder NAME goes (default: data)")
    add("--name", help="name of the folder (default: the corpus or the first input)")
    add("--vocab-size", type=int, default=defaults.vocab_size, help="entries of the byte-level BPE to train (default: %(default)s)")
    add("--tokenizer-file", help="use this tokenizer.json instead of training one")
    add("--tokenizer-type", choices=TYPES, default=defaults.tokenizer_type)
    add("--jsonl-key", default=defaults.jsonl_key, help="where the text is in a JSON line (default: %(default)s)")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=defaults.append_eod, help="end every document with the end-of-document token")
    add("--valid-fraction", type=float, help=f"share to hold out for validation (default: the corpus's own rule, else {VALID_FRACTION})")
    add("--test-fraction", type=float, help=f"share to hold out for test (default: the corpus's own rule, else {TEST_FRACTION})")
    add_on_error_option(parser)
    add("--force", action="store_true", help="prepare again even when it is there")
    values = vars(parser.parse_args(arguments))
    return PrepareOptions(**{**values, "inputs": tuple(values["inputs"])})


def main(arguments: list[str]) -> int:
    """0: prepared or up to date; 2: a sentence on standard error says what is wrong; 130: interrupted."""
    try:
        print(describe(prepare(parse(arguments), build_reporter())))
    except (DatasetError, TokenizerError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_data.py: {error.filename or 'writing'}: {error.strerror or error}; nothing was written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
