#!/usr/bin/env python
"""Turn text into token files, with labels that keep the beginning of each document out of the loss:

python tools/datasets/preprocess_data_with_mask.py --input qa.jsonl --tokenizer-type HFTokenizer --vocab-file tokenizer.json --append-eod \\
    --mask-before-token 23182,27 --output-prefix data/qa

This writes data/qa_text_document and data/qa_label_document. The labels are the tokens, but -100 up to and including the first place of the given
tokens. A document without them has all its tokens as labels. In a configuration, write train_data_paths and train_label_data_paths. The arguments
are GPT-NeoX's, and --on-error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def token_pattern(value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{value!r}: give token ids separated by commas, such as 0,1,1270")
    return tuple(int(part) for part in parts)


def get_args(input_args: list[str] | None = None) -> argparse.Namespace:
    from megatron.data.preprocessing.preprocess_options import add_input_options, add_output_options, add_text_tokenizer_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser, "text")
    parser.add_argument(
        "--mask-before-token", type=token_pattern, metavar="IDS", help="token ids, separated by commas, at the end of the masked part"
    )
    add_text_tokenizer_options(parser)
    add_output_options(parser)
    arguments = parser.parse_args(input_args)
    if arguments.mask_before_token is None:
        parser.error(
            "--mask-before-token is missing: give the tokens at the end of the masked part. To prepare text without masks, use preprocess_data.py"
        )
    return arguments


def main(input_args: list[str] | None = None) -> None:
    """Runs the command. Raises DatasetError, TokenizerError or WorkerError."""
    values = vars(get_args(input_args))
    from megatron.data.preprocessing.encode import TextTask
    from megatron.data.preprocessing.preprocess import preprocess, text_job
    from megatron.data.preprocessing.preprocess_options import common_options
    from megatron.data.progress import build_reporter

    options = common_options(values)
    given = {name: values[name] for name in ("tokenizer_type", "vocab_file", "merge_file", "append_eod", "ftfy")}
    task = TextTask(**given, mask_before=values["mask_before_token"])
    print("\n".join(preprocess(text_job(task, options.keys), options, build_reporter()).lines()))


if __name__ == "__main__":
    sys.exit(exit_status(main))
