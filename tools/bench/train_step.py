#!/usr/bin/env python
"""Training speed of a dense 8.9M-parameter NeoX model (6 layers, width 256, 8 heads, 256 tokens, vocabulary 8,192, 4 sequences a step).

Our engine and plain PyTorch run in turn in one process, so the ratio is reliable on a noisy machine. The machine's matmul rates are printed too, so
that numbers from different machines can be compared. Tokens per second are medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_gpt import PlainGPT, PlainTraining

from megatron.training.process import choose_accelerator, start_process

LAYERS, WIDTH, HEADS, SEQ_LENGTH, VOCABULARY, BATCH = 6, 256, 8, 256, 8192, 4
DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}
# GPT-NeoX on one process of a 2-core Xeon with AMX, where plain PyTorch reached 2,550 and 3,250 tokens/s: its share of plain PyTorch.
UPSTREAM_SHARE = {"fp32": 1600 / 2550, "bfloat16": 2860 / 3250}


def our_step(precision: str, zero_stage: int) -> Callable[[torch.Tensor], Any]:
    from megatron.config import config_from_dict
    from megatron.model.gpt import build_model
    from megatron.training.engine import build_engine
    from megatron.training.step import take_step

    model = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "seq_length": SEQ_LENGTH,
        "max_position_embeddings": SEQ_LENGTH,
    }
    run = {
        "train_iters": 1000,
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
        "precision": precision,
    }
    config = config_from_dict({**model, **run, "pos_emb": "rotary", "no_weight_tying": True, "zero_optimization": {"stage": zero_stage}})
    engine = build_engine(config, build_model(config.model, config.moe, VOCABULARY, seed=1), world_size=1)
    settings = {"learning_rate": 1e-4, "masked_token": None, "before_update": lambda: None}
    return lambda text: take_step(engine, itertools.repeat({"text": text}), **settings)


def plain_step(precision: str) -> Callable[[torch.Tensor], Any]:
    model = PlainGPT(layers=LAYERS, width=WIDTH, heads=HEADS, vocabulary=VOCABULARY, seq_length=SEQ_LENGTH)
    return PlainTraining(model.to(DTYPES[precision])).step


def seconds(step: Callable[[torch.Tensor], Any], steps: int) -> float:
    texts = torch.randint(VOCABULARY, (steps, BATCH, SEQ_LENGTH + 1))
    started = time.perf_counter()
    for text in texts:
        step(text)
    return (time.perf_counter() - started) / steps


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a [1024, 1024] product."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 1024**3 / statistics.median(times[2:])


def measure(precision: str, zero_stage: int, *, rounds: int, steps: int) -> dict[str, float]:
    ours, plain = our_step(precision, zero_stage), plain_step(precision)
    for step in (ours, plain):
        seconds(step, 2)
    pairs = [(seconds(ours, steps), seconds(plain, steps)) for _ in range(rounds)]
    tokens = BATCH * SEQ_LENGTH
    ratio = statistics.median(b / a for a, b in pairs)
    speeds = {
        "tokens_per_second": tokens / statistics.median(a for a, _ in pairs),
        "plain_tokens_per_second": tokens / statistics.median(b for _, b in pairs),
    }
    return {**speeds, "ratio_to_plain": ratio, "ratio_to_upstream": ratio / UPSTREAM_SHARE[precision], "matmul_flops": matmul_rate(DTYPES[precision])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--zero-stage", type=int, default=0, choices=range(4))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each in a round")
    arguments = parser.parse_args()
    choose_accelerator()
    start_process(backend=None, threads=None)
    for precision in arguments.precision:
        result = measure(precision, arguments.zero_stage, rounds=arguments.rounds, steps=arguments.steps)
        print(json.dumps({"precision": precision, "zero_stage": arguments.zero_stage, "threads": torch.get_num_threads(), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
