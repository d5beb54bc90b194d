#!/usr/bin/env python
"""Speed of decoding: a Mixtral-like model of 300 million active parameters, ours and transformers' `generate` with each of its experts.

All sides have the same weights and take turns in one process. Times are medians of the seconds of one token. Also: the share of what memory
bandwidth allows, int8 weights, eight texts at once, and a token after 64 and after 2,000 others.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from moe_bench.decoding import FULL, LIBRARY, QUICK, build_ours, build_theirs, medians, our_seconds, read_bandwidth, runner_of, their_seconds
from moe_bench.machine import this_machine

from megatron.inference.model import Decoding

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, some seconds")
    parser.add_argument("--precision", choices=FORMATS, default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--experts", nargs="*", choices=LIBRARY, default=LIBRARY, help="transformers' implementations; none: only ours")
    parser.add_argument("--long", type=int, default=2000, help="a token after so many others as well; 0: not")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    shape, dtype = QUICK if given.quick else FULL, FORMATS[given.precision]
    prompts = [[(17 * text + 31 * place) % shape.vocabulary for place in range(32)] for text in range(8)]
    gpt = build_ours(shape, dtype)
    theirs = build_theirs(shape, gpt) if given.experts else None
    ours = runner_of(shape, gpt, Decoding())
    module = runner_of(shape, gpt, Decoding(backend="reference"))
    small = runner_of(shape, build_ours(shape, dtype), Decoding(weights="int8"))
    rounds, bandwidth, same = [], [], 0
    for _ in range(given.rounds):
        bandwidth.append(read_bandwidth())
        one, answers = our_seconds(ours, prompts[:1], given.tokens)
        times = {"ours": one, "ours, int8": our_seconds(small, prompts[:1], given.tokens)[0]}
        times["ours, 8 texts"] = our_seconds(ours, prompts, given.tokens)[0]
        times["ours, by the model's forward"] = our_seconds(module, prompts[:1], max(3, given.tokens // 8))[0]
        for name in given.experts:
            theirs.set_experts_implementation(name)
            times[f"transformers, {name}"], tokens = their_seconds(theirs, prompts[0], max(3, given.tokens // 4))
            same = max(same, sum(a == b for a, b in zip(answers[0], tokens, strict=False)))
        if given.long and not given.quick:
            long = [place % shape.vocabulary for place in range(given.long)]
            times[f"ours, after {given.long} tokens"] = our_seconds(ours, [long], given.tokens)[0]
        rounds.append(times)
        print(f"round {len(rounds)} of {given.rounds}", file=sys.stderr)
    found, bytes_read = medians(rounds), shape.active() * dtype.itemsize
    best = min((found[f"transformers, {name}"] for name in given.experts), default=None)
    result = {
        "machine": this_machine("cpu").sentences(),
        "active_parameters": shape.active(),
        "tokens_per_second": {name: (8 if "8 texts" in name else 1) / seconds for name, seconds in found.items()},
        "over_transformers": None if best is None else best / found["ours"],
        "bandwidth_gb_s": max(bandwidth) / 1e9,
        "share_of_bandwidth": bytes_read / found["ours"] / max(bandwidth),
        "int8_over_ours": found["ours"] / found["ours, int8"],
        "8_texts_over_one": 8 * found["ours"] / found["ours, 8 texts"],
        "same_tokens_as_transformers": same,
    }
    print(json.dumps(result) if given.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
