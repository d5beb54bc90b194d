#!/usr/bin/env python
"""Train the same model in several layouts of processes and compare every number with one process: losses, gradients, auxiliary losses.

The table has the largest differences: of losses, of the auxiliary losses and of the gradients' norm relative to their value, of gradients relative to
the largest number of the weight's gradient. All of it runs on CPUs over gloo, in float32. Exit status 1: something is further apart than allowed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.invariants.equivalence import LAYOUTS, MODELS, STEPS, compare

HEAD = "| model | layout | processes | losses | auxiliary losses | gradients | norm |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT", help=f"some of: {', '.join(LAYOUTS)}")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, help="a file for the table, in Markdown")
    given = parser.parse_args()
    pairs = [(model, layout) for model in given.model for layout in given.layout if LAYOUTS[layout].suits(MODELS[model])]
    rows, failed, started = [], [], time.monotonic()
    for number, (model, layout) in enumerate(pairs, 1):
        sys.stderr.write(f"{time.monotonic() - started:6.0f} s  {number} of {len(pairs)}: {model}, {layout}\n")
        found = compare(MODELS[model], LAYOUTS[layout], steps=given.steps)
        numbers = (found.loss, found.auxiliary, found.gradient, found.norm)
        rows.append(f"| {model} | {layout} | {LAYOUTS[layout].processes} | " + " | ".join(f"{number:.1e}" for number in numbers) + " |")
        failed += [f"{model}, {layout}: {problem}" for problem in found.problems()]
    table = "\n".join([HEAD, *rows])
    print(table)
    if given.output is not None:
        given.output.write_text(table + "\n")
    for problem in failed:
        print(f"further apart than allowed: {problem}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
