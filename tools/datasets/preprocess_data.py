#!/usr/bin/env python
"""Turn text into token files: python tools/datasets/preprocess_data.py --input corpus.jsonl --tokenizer-type HFTokenizer --vocab-file
tokenizer.json \\
    --append-eod --output-prefix data/mine

This writes data/mine_text_document.bin and .idx. In a configuration, write data_path: data/mine_text_document. The arguments are GPT-NeoX's, and
--on-error. If several --jsonl-keys are given, the text of each key is tokenized (GPT-NeoX writes the text under "text" for all of them).
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
    """Runs the command. Raises DatasetError, TokenizerError or WorkerError."""
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
