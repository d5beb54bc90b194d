#!/usr/bin/env python
"""How large models are, from their configurations alone, and which setting makes one as large as another.

python tools/analysis/size.py CONFIG [CONFIG ...] [--match OTHER [--active]] [--vocab N] [--processes N] [--zero STAGE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status

PLAIN_WIDTH = 200  # of the tables when they go to a file or pipe


def at_least_one(text: str) -> int:
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not '{text}'")
    return int(digits)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How large models are, from their configurations alone. FLOPs: of training, without recomputation.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="a model file, such as configs/mixtral/8x7B.yml")
    parser.add_argument("--match", metavar="OTHER", help="the rank, number of LoREs or of experts that makes each CONFIG as large as this one")
    parser.add_argument("--active", action="store_true", help="with --match: the parameters that one token meets, instead of all")
    vocab = "tokens of the vocabulary; by default the config's tokenizer's, or what the file's head says"
    parser.add_argument("--vocab", type=at_least_one, metavar="N", help=vocab)
    parser.add_argument("--processes", type=at_least_one, default=1, metavar="N", help="processes that ZeRO divides over (default 1)")
    parser.add_argument("--zero", type=int, choices=range(4), metavar="STAGE", help="ZeRO stage 0 to 3; by default each config's")
    options = parser.parse_args(argv)
    if options.active and options.match is None:
        parser.error("--active says what --match compares; give --match OTHER too")
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
            console.print(match_table(found) if found else "no value of one key alone reaches it")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
