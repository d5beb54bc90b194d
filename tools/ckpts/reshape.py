#!/usr/bin/env python
"""Write a checkpoint again for another number of tensor-parallel processes and pipeline stages, without a GPU and about one layer at a time.

python tools/ckpts/reshape.py runs/quickstart reshaped --model-parallel-size 2 --pipe-parallel-size 2

This program resumes from any layout without this tool. It is for GPT-NeoX, and for tools that want a layout of their own. It reads checkpoints of
this program and of GPT-NeoX in any layout. At the end the checksum of every tensor is compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def at_least(smallest: int, text: str) -> int:
    """A whole number from `smallest` on."""
    if not text.isdecimal() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {smallest} on")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a checkpoint again for another number of tensor-parallel processes and pipeline stages.")
    parser.add_argument("input", type=Path, help="a checkpoint (global_step100), or the directory of a run (its latest checkpoint)")
    parser.add_argument("output", type=Path, help="directory to write global_stepN and `latest` in")
    parser.add_argument("--model-parallel-size", type=lambda text: at_least(1, text), default=1, help="tensor-parallel processes; default: 1")
    parser.add_argument(
        "--pipe-parallel-size",
        type=lambda text: at_least(0, text),
        default=1,
        help="pipeline stages; 0: one file for all layers of a process, which needs memory for all of them; default: 1, a file for each layer",
    )
    parser.add_argument(
        "--config_file", type=Path, nargs="+", default=[], help="YAML file of the model; default: the configuration in the checkpoint"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="import the plugins that the checkpoint's own configuration names")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        from megatron.checkpoint.reshape import reshape_checkpoint, total_bytes
        from megatron.checkpoint.save_weights import Division
        from megatron.checkpoint.weights import Expected
        from megatron.convert.opened import open_checkpoint
        from megatron.data.progress import build_reporter

        opened = open_checkpoint(options.input, options.config_file, trusted=options.trust_remote_code)
        model = opened.source.config.model
        expected = Expected(parallel_residual=model.gpt_j_residual, gqa_layout=opened.source.config.checkpoint.gqa_layout)
        division = Division(options.model_parallel_size, options.pipe_parallel_size, parallel_residual=model.gpt_j_residual)
        with build_reporter().stage(f"Reshaping {opened.path}", total_bytes(opened.path, expected)) as stage:
            written = reshape_checkpoint(opened.path, options.output, division, expected, lambda size: stage.advance(size, 0))
        for notice in written.notices:
            print(notice)
        print(f"Wrote {written.path}. {written.compared:,} checksums of {opened.path} were compared, and all new files were read again.")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
