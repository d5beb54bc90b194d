#!/usr/bin/env python
"""Compute the sizes of models from their configurations, and the settings that make one model as large as another.

python tools/analysis/size.py CONFIG [CONFIG ...] [--match OTHER [--active]] [--vocab N] [--processes N] [--zero STAGE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import at_least_one, exit_status

PLAIN_WIDTH = 200  # of the tables when they go to a file or pipe


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compute the sizes of models from their configurations. FLOPs are those of training, without recomputation."
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="a model file, such as configs/mixtral/8x7B.yml")
    parser.add_argument(
        "--match", metavar="OTHER", help="find the rank, the number of LoREs or the number of experts that makes each CONFIG as large as this one"
    )
    parser.add_argument(
        "--active", action="store_true", help="with --match: compare the active parameters (those that one token uses) and not all parameters"
    )
    vocab = "number of tokens in the vocabulary (default: from the config's tokenizer, or from the comment at the top of the file)"
    parser.add_argument("--vocab", type=at_least_one, metavar="N", help=vocab)
    parser.add_argument(
        "--processes", type=at_least_one, default=1, metavar="N", help="number of processes that share the memory under ZeRO (default: 1)"
    )
    parser.add_argument("--zero", type=int, choices=range(4), metavar="STAGE", help="ZeRO stage 0 to 3 (default: each config's own)")
    options = parser.parse_args(argv)
    if options.active and options.match is None:
        parser.error("--active changes what --match compares: give --match OTHER too")
    return options


def main(argv: list[str]) -> int:
    options = arguments(argv)

    def work() -> None:
        from rich.console import Console
        from rich.markup import escape

        from megatron.analysis.size import Layout, matches, read_sizes
        from megatron.analysis.size_report import by_part, match_table, overview

        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        layout = Layout(options.vocab, options.processes, options.zero)
        sizes = read_sizes([*options.configs, *([options.match] if options.match else [])], layout)
        console.print(overview(sizes, layout), "", by_part(sizes), sep="\n")
        if not options.match:
            return
        *models, other = sizes
        for model in models:
            console.print(
                f"\n[bold]{escape(model.name)} as large as {escape(other.name)}[/bold] ({'active' if options.active else 'all'} parameters)"
            )
            found = matches(model, other, active=options.active)
            console.print(match_table(found) if found else "no value of a single key reaches this size")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
