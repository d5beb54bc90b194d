#!/usr/bin/env python
"""Compare the implementations of the kernels with each other and with the libraries, in one process, in turns.

Candidates: every implementation that can run here, PyTorch's `grouped_mm`, Hugging Face's experts, and a dense product with as many operations. The
table has medians. "x reference" and "x grouped_mm" say how many times as fast a candidate is. "of the roofline" is the least possible time over the
measured time. The least possible time follows from the operations, the bytes, and the rates that this machine reached in the same rounds.

Exit status 1: `auto` takes an implementation that is slower than another one by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from moe_bench.kernel_table import kernels_markdown, kernels_plot, layers_markdown, measure_shape, rate_sentences, verdict
from moe_bench.layer_cost import layer_costs
from moe_bench.machine import Meter, Watch, this_machine
from moe_bench.shapes import DTYPES, FULL, QUICK, TINY

from megatron.kernels.heap import use_heap
from megatron.training.process import keep_freed_memory

TINY_STREAMS = {"size": 256, "stream_bytes": 1 << 22}
QUICK_STREAMS = {"size": 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, less than a minute")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs: seconds")
    parser.add_argument("--gpu", action="store_true", help="on CUDA, with CUDA events")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", help="only the shapes with these names")
    parser.add_argument("--rounds", type=int, help="default: 5; 3 with --quick")
    parser.add_argument("--budget", type=float, help="longest time of a call in seconds; longer ones are estimated (default: 10; 0.5 with --quick)")
    parser.add_argument("--output", type=Path, help="a folder for kernels.md and kernels.png")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    given = parser.parse_args()
    keep_freed_memory()
    if not given.gpu:
        use_heap()
    small = given.quick or given.tiny
    rounds, budget = given.rounds or (3 if small else 5), given.budget or (0.5 if small else 10.0)
    known = TINY if given.tiny else QUICK if given.quick else FULL
    chosen = [(s, d) for s, d in known if d in given.dtype and s.name in (given.shape or [s.name])]
    if not chosen:
        parser.error(f"no shape of these names in these dtypes; known: {', '.join(dict.fromkeys(s.name for s, _ in known))}")
    if given.gpu and not torch.cuda.is_available():
        parser.error("--gpu: PyTorch finds no CUDA device")
    watch, machine = Watch(), this_machine("cuda" if given.gpu else "cpu")
    meter = Meter("cuda" if given.gpu else "cpu", **(TINY_STREAMS if given.tiny else QUICK_STREAMS if given.quick and not given.gpu else {}))
    results = []
    for n, (shape, dtype) in enumerate(chosen, 1):
        watch.say(f"{n} of {len(chosen)}: {shape.name}, {dtype}")
        results.append(measure_shape(shape, dtype, meter, rounds=rounds, budget=budget))
    rows, slower, rates = ([each for result in results for each in result[place]] for place in range(3))
    watch.say("the cost of the LoREs")
    costs = layer_costs(chosen, rounds=rounds, budget=3 * budget, device=meter.device)
    lines = [
        *machine.sentences(),
        *watch.sentences(machine.cores),
        *rate_sentences(meter, rates, given.dtype),
        *dict.fromkeys(s.sentence() for s, _ in chosen),
    ]
    parts = ["  \n".join(lines), kernels_markdown(rows), verdict(slower), "The cost of the LoREs, forward + backward:", layers_markdown(costs)]
    if given.json:
        groups = {"rows": rows, "slower": slower, "layers": costs}
        print(json.dumps({"machine": asdict(machine), **{name: [row._asdict() for row in group] for name, group in groups.items()}}))
    else:
        print("\n\n".join(parts))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "kernels.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        kernels_plot(rows, given.output / "kernels.png")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
