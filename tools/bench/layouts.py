#!/usr/bin/env python
"""Tokens a second of several processes with one thread each beside one process with as many threads, in turns, on the same model and batch.

The model is the one of docs/performance.md: Mixtral-like, 117.5M parameters. Every layout takes the same global batch. A run is a fresh set of
processes; the figure of a run is the median of its steps, that of a layout the median of its runs. The optimizer's bytes are measured, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import torch

from megatron.config import config_from_dict
from megatron.testing.distributed import run_distributed

MODEL: Mapping[str, Any] = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "seq_length": 512,
    "max_position_embeddings": 512,
    "intermediate_size": 1024,
    "activation": "swiglu",
    "norm": "rmsnorm",
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_losses": {"load_balance": 0.01},
    "use_bias_in_attn_linear": False,
    "train_iters": 100,
    "train_batch_size": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
}
VOCABULARY = 8192
LAYOUTS: Mapping[str, dict[str, Any]] = {
    "one process": {},
    "DP2": {},
    "DP2 ZeRO 1": {"zero_optimization": {"stage": 1}},
    "TP2": {"model_parallel_size": 2},
    "TP2, experts by width": {"model_parallel_size": 2, "moe_tensor_parallel": "width"},
    "EP2": {"moe_expert_parallel_size": 2},
}
PROCESSES = {"one process": 1}


def measure(values: Mapping[str, Any], threads: int, steps: int) -> tuple[float, int]:
    """On each process: (median seconds of a step after the first, bytes of the optimizer's state here)."""
    from megatron.training.engine import build_engine
    from megatron.training.process import start_process
    from megatron.training.setup import model_of_process
    from megatron.training.step import take_step

    config = config_from_dict(dict(values))
    topology = start_process(backend="gloo", threads=threads, layout=config.parallel.layout)
    model = model_of_process(config, VOCABULARY)
    engine = build_engine(config, model, world_size=topology.data_parallel_size)
    size = engine.train_micro_batch_size_per_gpu()
    generator = torch.Generator().manual_seed(topology.data_parallel_rank)
    data = iter(lambda: {"text": torch.randint(VOCABULARY, (size, config.model.seq_length + 1), generator=generator)}, None)
    seconds = [take_step(engine, data, learning_rate=1e-4, masked_token=None, before_update=lambda: None).seconds for _ in range(steps + 1)]
    return statistics.median(seconds[1:]), state_bytes(engine)


def state_bytes(engine: Any) -> int:
    """Bytes of the tensors in the optimizer's state on this process."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sum(value.nbytes for state in inner.state.values() for value in state.values() if torch.is_tensor(value))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    layouts = list(dict.fromkeys(["one process", *given.layout]))
    times: dict[str, list[float]] = {name: [] for name in layouts}
    held: dict[str, int] = {}
    for number in range(given.rounds):
        for name in layouts:
            processes = PROCESSES.get(name, 2)
            found = run_distributed(measure, processes, {**MODEL, **LAYOUTS[name]}, 2 // processes, given.steps, timeout=900.0)
            times[name].append(max(seconds for seconds, _ in found))
            held[name] = max(size for _, size in found)
            sys.stderr.write(f"round {number + 1} of {given.rounds}: {name} {times[name][-1]:.2f} s a step\n")
    alone = statistics.median(times["one process"])
    tokens = MODEL["train_batch_size"] * MODEL["seq_length"]
    print("| layout | processes x threads | tokens/s | of one process | optimizer state on a process |\n| --- | --- | ---: | ---: | ---: |")
    for name in layouts:
        seconds, processes = statistics.median(times[name]), PROCESSES.get(name, 2)
        size = f"{held[name] / 2**20:,.0f} MiB"
        print(f"| {name} | {processes} x {2 // processes} | {tokens / seconds:,.0f} | {alone / seconds:.2f} | {size} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
