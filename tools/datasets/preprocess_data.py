#!/usr/bin/env python
"""Text to token files: python tools/datasets/preprocess_data.py --input corpus.jsonl --tokenizer-type HFTokenizer --vocab-file tokenizer.json \\
    --append-eod --output-prefix data/mine

writes data/mine_text_document.bin and .idx; in a configuration, data_path: data/mine_text_document. GPT-NeoX's arguments, and --on-error. Each of
several --jsonl-keys is tokenized on its own (GPT-NeoX writes the text under "text" for all of them).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def get_args(input_args: list[str] | None = None) -> argparse.Namespace:
    from megatron.data.preprocessing.preprocess_options import add_input_options, add_output_options, add_text_tokenizer_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser, "text")
    add_text_tokenizer_options(parser)
    add_output_options(parser)
    return parser.parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    """What the command does. Raises DatasetError, TokenizerError or WorkerError."""
    values = vars(get_args(input_args))
    from megatron.data.preprocessing.encode import TextTask
    from megatron.data.preprocessing.preprocess import preprocess, text_job
    from megatron.data.preprocessing.preprocess_options import common_options
    from megatron.data.progress import build_reporter

    options = common_options(values)
    task = TextTask(**{name: values[name] for name in ("tokenizer_type", "vocab_file", "merge_file", "append_eod", "ftfy")})
    print("\n".join(preprocess(text_job(task, options.keys), options, build_reporter()).lines()))


if __name__ == "__main__":
    sys.exit(exit_status(main))
