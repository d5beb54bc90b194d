#!/usr/bin/env python
"""Write a Hugging Face model as a checkpoint, with a configuration for further training, and compare the logits with the original.

python tools/ckpts/convert_hf_to_neox.py --model_path pythia-160m --output_dir runs/pythia-160m
python tools/ckpts/convert_hf_to_neox.py --model_path llama --output_dir runs/moe --upcycle moe.yml    # a mixture of experts from a dense model

The model is a directory with config.json and weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status

CHOICES = ("add", "drop")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a Hugging Face model as a checkpoint, and compare the logits with the original.")
    parser.add_argument("--model_path", "--model", "--hf-model-name", "--input_dir", dest="input_dir", type=Path, required=True, help="its directory")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="directory to write; it must not exist yet")
    parser.add_argument("--tp", type=int, default=1, help="number of tensor-parallel processes to divide the weights for; default: 1")
    parser.add_argument("--pp", type=int, default=0, help="pipe_parallel_size; with 1 or more, each layer gets its own file; default: 0")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp16", "bf16", "fp32"], help="number format of the weights; default: that of the model"
    )
    parser.add_argument("--upcycle", type=Path, metavar="YAML", help="YAML file with moe_ keys: turn the dense MLPs into experts")
    parser.add_argument("--extra-tokens", choices=CHOICES, help="tokens that the model has no rows for: add rows, or drop the tokens")
    parser.add_argument(
        "--add-tokens", nargs="+", default=[], metavar="TOKEN", help="special tokens to add; their rows start as the mean of all other rows"
    )
    parser.add_argument("--skip-check", action="store_true", help="do not load the result and compare its logits")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model's directory in order to compare the logits")
    parser.add_argument("--force", action="store_true", help="write into an existing directory; replaces an earlier import, but not a run")
    options = parser.parse_args(argv)
    if options.tp < 1 or options.pp < 0:
        parser.error("--tp must be at least 1 and --pp at least 0")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        from megatron.convert.from_huggingface import Import, described, import_model, read_keys
        from megatron.convert.imported_tokenizer import Fitting
        from megatron.data.progress import build_reporter

        request = Import(
            options.input_dir,
            options.output_dir,
            options.precision,
            tensor_parallel=options.tp,
            stages=options.pp,
            upcycle=read_keys(options.upcycle) if options.upcycle else None,
            check=not options.skip_check,
            fitting=Fitting(options.extra_tokens, tuple(options.add_tokens)),
            force=options.force,
            trust_remote_code=options.trust_remote_code,
        )
        for line in described(import_model(request, build_reporter())):
            print(line)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
