#!/usr/bin/env python
"""Write a checkpoint as a Hugging Face model, and compare the logits with the original.

python tools/ckpts/convert_neox_to_hf.py --input_dir runs/quickstart/global_step1100 --output_dir quickstart-hf

The checkpoint may lie on disk in any of GPT-NeoX's layouts (ZeRO 0 to 3, pipeline, tensor parallel). The class is the one that holds the model;
what none of transformers' own can hold becomes a StructMoEForCausalLM, whose code is written beside the weights.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of `5GB`, `500MB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]B|)", text.strip().upper())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write a size such as 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a checkpoint as a Hugging Face model, and compare the logits with the original.")
    parser.add_argument(
        "--input_dir", type=Path, required=True, help="a checkpoint (global_step100), or the directory of a run (its latest checkpoint)"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="directory to write; it must not exist yet")
    parser.add_argument(
        "--config_file", type=Path, nargs="+", default=[], help="YAML file of the model; default: the configuration in the checkpoint"
    )
    parser.add_argument("--architecture", default="auto", help="neox, llama, mistral, mixtral, ..., structmoe; default: the one that fits")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp16", "bf16", "fp32"], help="number format of the weights; default: that of the checkpoint"
    )
    parser.add_argument("--no_save_tokenizer", action="store_true", help="export no tokenizer")
    parser.add_argument("--vocab-is-hf-tokenizer", action="store_true", help="the configuration's vocab_file is a Hugging Face tokenizer")
    parser.add_argument("--pad-token-id", type=int, help="id of the padding token, for config.json")
    parser.add_argument("--max-shard-size", type=size, default="1GB", help="largest size of one file of weights; default: 1GB")
    parser.add_argument("--skip-check", action="store_true", help="do not load the result and compare its logits")
    parser.add_argument("--trust-remote-code", action="store_true", help="import the plugins that the checkpoint's own configuration names")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier export; other files are never deleted")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        from megatron.convert.to_huggingface import Export, described, export_checkpoint
        from megatron.data.progress import build_reporter

        export = Export(
            options.input_dir,
            options.output_dir,
            tuple(options.config_file),
            options.architecture,
            options.precision,
            save_tokenizer=not options.no_save_tokenizer,
            vocab_is_hf=options.vocab_is_hf_tokenizer,
            pad_token_id=options.pad_token_id,
            shard_bytes=options.max_shard_size,
            check=not options.skip_check,
            force=options.force,
            trust_remote_code=options.trust_remote_code,
        )
        for line in described(export_checkpoint(export, build_reporter()), options.output_dir):
            print(line)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
