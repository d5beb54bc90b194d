#!/usr/bin/env python
"""What experts in slow memory would cost, from a routing trace and without the model: hit rates of every policy, and how local the routing is.

python tools/analysis/offload.py TRACE [--slots 2 4 8] [--policy lru lfu] [--granularity lore] [--profile OTHER] [--json FILE]

TRACE: a file of `expert_offload.record`, a step's folder of `routing_trace_steps`, routed experts of vLLM (.npy, or an answer of its server as
.json), or Megatron-Core's router_trace (.jsonl).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.config.expert_offload import POLICY_NAMES
from megatron.script import exit_status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What experts in slow memory would cost, from a routing trace and without the model.")
    parser.add_argument("trace", type=Path, help="the trace")
    parser.add_argument("--slots", type=int, nargs="+", default=[], help="slots of each layer; default: 1/8, 1/4, 1/2 and all of the experts")
    parser.add_argument("--policy", nargs="+", choices=POLICY_NAMES, default=list(POLICY_NAMES), help="default: all")
    parser.add_argument("--granularity", choices=["expert", "lore"], default="expert", help="what moves")
    parser.add_argument("--profile", type=Path, help="the trace that static learns from; default: TRACE itself")
    parser.add_argument("--num-experts", type=int, help="of a layer, where the trace does not say it")
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 16, 64], help="tokens of a window for SCH and SRP")
    parser.add_argument("--json", type=Path, help="file that gets all numbers")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from rich.console import Console

        from megatron.analysis.offload.report import locality_tables, residency, simulation_table
        from megatron.analysis.routing.locality import locality
        from megatron.monitor.trace_parts import read_whole

        trace = read_whole(options.trace, num_experts=options.num_experts)
        profile = read_whole(options.profile, num_experts=options.num_experts) if options.profile else None
        sizes = options.slots or residency(trace, granularity=options.granularity)
        table, numbers = simulation_table(trace, options.policy, sizes, granularity=options.granularity, profile=profile)
        found = locality(trace, windows=options.windows)
        console = Console(width=None if sys.stdout.isatty() else 160)
        for shown in (table, *locality_tables(found)):
            console.print(shown)
        if options.json:
            options.json.write_text(json.dumps({"simulation": numbers, "locality": found._asdict()}, indent=1) + "\n")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
