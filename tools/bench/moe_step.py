#!/usr/bin/env python
"""Training speed and memory of a Mixtral-like model: our engine as users run it, and Hugging Face's MixtralForCausalLM with each of its experts.

All sides take turns in one process; times are medians. The optimizer (AdamW, clipping) and the number of threads are the same. Peak memory is that of
a process of its own for each side. Also measured: a StructMoE step against plain ones, and the quickstart with `kernel_backends` all `reference`
against `auto`, on the same text.

On a processor without bf16 instructions a bf16 step of Hugging Face can take minutes. Then its time is estimated from fewer tokens, which the table
says, and its memory is not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from moe_bench.machine import Watch, this_machine
from moe_bench.step_report import findings, quickstart_markdown, steps_markdown, steps_plot
from moe_bench.step_times import measure_quickstart, measure_steps, memory_names, memory_of, rows_of, side_names, train_for_memory
from moe_bench.steps import FULL, QUICK, TINY

from megatron.training.process import choose_accelerator, start_process

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"full": FULL, "quick": QUICK, "tiny": TINY}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="a small model, less than a minute")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="only to see that it runs")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, help="default: 5; 2 with --quick")
    parser.add_argument("--budget", type=float, help="longest time of a step in seconds; longer ones are estimated (default: 60; 4 with --quick)")
    parser.add_argument("--quickstart-steps", type=int, help="default: 100; 5 with --quick; 0: leave it out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--output", type=Path, help="a folder for moe_step.md and moe_step.png")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--memory-of", nargs=3, metavar=("SIZE", "PRECISION", "SIDE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    choose_accelerator()
    if given.memory_of:
        size, *what = given.memory_of
        print(json.dumps(train_for_memory(SHAPES[size], *what)))
        return 0
    start_process(backend=None, threads=None)
    small, shape, machine, watch, rows = given.size != "full", SHAPES[given.size], this_machine("cpu"), Watch(), []
    rounds, budget = given.rounds or (2 if small else 5), given.budget or (4.0 if small else 60.0)
    steps = given.quickstart_steps if given.quickstart_steps is not None else 5 if small else 100
    for precision in given.precision:
        watch.say(f"{precision}: steps")
        times, parameters = measure_steps(shape, precision, side_names(precision, small=small), rounds=rounds, budget=budget)
        names = [] if given.no_memory or (small and rows) else memory_names(times, small=small)
        watch.say(f"{precision}: memory of {len(names)} processes")
        with ThreadPoolExecutor(2 if small else 1) as pool:
            memory = list(pool.map(lambda name, p=precision: memory_of([__file__, "--memory-of", given.size, p, name]), names))
        rows += rows_of(times, parameters, dict(zip(names, memory, strict=True)), shape, precision)
    if steps:
        watch.say(f"quickstart: {steps} steps twice")
    quickstart = measure_quickstart(ROOT, steps) if steps else None
    parts = [
        "  \n".join([*machine.sentences(), *watch.sentences(machine.cores), shape.sentence()]),
        steps_markdown(rows),
        "\n".join(f"- {each}" for each in findings(rows)),
    ]
    parts += [quickstart_markdown(quickstart)] if quickstart else []
    if given.json:
        values = {"machine": asdict(machine), "rows": [row._asdict() for row in rows], "quickstart": quickstart and quickstart._asdict()}
        print(json.dumps(values))
    else:
        print("\n\n".join(parts))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "moe_step.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        steps_plot(rows, given.output / "moe_step.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
