#!/usr/bin/env python
"""What each kind of recomputation keeps for the backward pass, what it computes again, and how long a step takes, for one micro-batch of a model.

python tools/bench/recompute.py -d configs quickstart.yml
python tools/bench/recompute.py -d configs structmoe/125M-710M-redpajama.yml --override num_layers=4 seq_length=256 --batch 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from megatron.analysis.tables import bytes_text
from megatron.config.loader import load_config
from megatron.config.size import flops_per_token
from megatron.config.training import TrainingConfig
from megatron.model import GPT, build_model, choose_implementations

WAYS: dict[str, dict[str, Any]] = {
    "nothing is recomputed": {},
    "recompute_modules: [attention]": {"recompute_modules": ["attention"]},
    "recompute_modules: [experts]": {"recompute_modules": ["experts"]},
    "recompute_modules: [moe]": {"recompute_modules": ["moe"]},
    "recompute_modules: [attention, moe]": {"recompute_modules": ["attention", "moe"]},
    "checkpoint_activations: true": {"checkpoint_activations": True},
    "checkpoint_num_layers: 2 with it": {"checkpoint_activations": True, "checkpoint_num_layers": 2},
}
DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}


def kept_bytes(model: GPT, text_BS: torch.Tensor) -> int:
    """Bytes that one forward keeps for the backward, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(text_BS[:, :-1], labels_BS=text_BS[:, 1:])
    assert output.loss is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def seconds(model: GPT, text_BS: torch.Tensor, rounds: int) -> float:
    """The median time of forward and backward."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        loss = model(text_BS[:, :-1], labels_BS=text_BS[:, 1:]).loss
        assert loss is not None
        loss.backward()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+")
    parser.add_argument("-d", "--conf-dir", type=Path, default=None)
    parser.add_argument("--override", nargs="*", default=[], help="key=value")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    config = load_config(given.config, given.override, given.conf_dir).config
    text_BS = torch.randint(given.vocabulary, (given.batch, config.model.seq_length + 1), generator=torch.Generator().manual_seed(1))
    plain = flops_per_token(config.model, config.moe, given.vocabulary)
    print(f"| {config.precision}, {given.batch} x {config.model.seq_length} tokens | kept | FLOPs | s per step |\n|---|---:|---:|---:|")
    for name, keys in WAYS.items():
        training = TrainingConfig(**keys)
        model = build_model(config.model, config.moe, given.vocabulary, seed=1, dtype=DTYPES[config.precision])
        choose_implementations(config.model, config.moe, model)
        if training.checkpoint_activations:
            model.enable_activation_checkpointing(training.checkpoint_num_layers)
        model.recompute_modules(training.recompute_modules)
        again = training.checkpoint_activations, training.recompute_modules
        flops = flops_per_token(config.model, config.moe, given.vocabulary, recompute=again[0], modules=again[1])
        kept, took = kept_bytes(model, text_BS), seconds(model, text_BS, given.rounds)
        print(f"| `{name}` | {bytes_text(kept)} | {flops / plain:.2f}x | {took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
