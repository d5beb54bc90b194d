#!/usr/bin/env python
"""Measure generation with experts in slow memory: CoSMoEs' Tables 3 and 4 in their form, and hit rate, speed and memory by the share of experts
that is resident. Every setting runs in a process of its own.

python tools/bench/offload.py a.yml [b.yml,more.yml ...] --text data/test.txt [--tokens 128] [--store experts.packed] [--json out.json]

Each MODEL is a configuration with `load`; several files of one are joined by commas. f/c is the time to read one token's experts over the time to
compute a token with all resident: with it, speeds on another machine or disk can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.config.expert_offload import POLICY_NAMES
from megatron.config.machine import usable_cores
from megatron.script import exit_status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure generation with experts in slow memory.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="configuration files of a model, joined by commas")
    parser.add_argument("-d", "--conf-dir", type=Path, help="where the files are")
    parser.add_argument("--override", nargs="*", default=[], help="key=value, for all models")
    parser.add_argument("--text", type=Path, required=True, help="file with texts, an empty line between two: their beginnings are the prompts")
    parser.add_argument("--prompts", type=int, default=4, help="number of prompts")
    parser.add_argument("--prompt-tokens", type=int, default=1, help="tokens of a prompt; the paper has 1")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are generated; the paper has 128")
    parser.add_argument(
        "--policy", choices=[name for name in POLICY_NAMES if name != "belady"], default="lru", help="of the table by share of resident experts"
    )
    parser.add_argument("--prefetch", action="store_true", help="ask the next layer's router early")
    parser.add_argument("--store", nargs="*", default=[], help="a packed file for each model; default: the checkpoints")
    parser.add_argument("--bandwidth", help="bytes that are read in a second at most, such as 500MB")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="that compute")
    parser.add_argument("--json", type=Path, help="file that gets all numbers")
    parser.add_argument("--plot", type=Path, help="picture (PNG)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from rich.console import Console

        from megatron.analysis.offload.measure import Work
        from megatron.analysis.offload.measure_report import Rows, plot, residency_table, table_3, table_4
        from megatron.config.loader import load_config

        texts = [text for text in options.text.read_text().split("\n\n") if text.strip()][: options.prompts]
        stores = dict(zip(options.models, options.store, strict=False))
        shared: dict[str, Any] = {"policy": options.policy, "prefetch": options.prefetch, "bandwidth": options.bandwidth}
        rows = []
        for name in options.models:
            config = load_config(name.split(","), options.override, options.conf_dir).config
            one = Work(config.given(), texts, options.prompt_tokens, options.tokens, options.threads)
            rows.append(Rows(Path(name.split(",")[0]).stem, one, config.moe.top_k, options={**shared, "store": stores.get(name)}))
        console = Console(width=None if sys.stdout.isatty() else 160)
        for table in (table_3(rows), table_4(rows), residency_table(rows)):
            console.print(table)
        if options.json:
            settings = {key: str(value) for key, value in vars(options).items()}
            options.json.write_text(json.dumps({"settings": settings, "models": [row.content() for row in rows]}, indent=1) + "\n")
        if options.plot:
            plot(rows, options.plot)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
