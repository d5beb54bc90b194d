"""Tables, sentences and a plot of the measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_bench.kernel_table import number
from moe_bench.step_times import OURS, STRUCTMOE, WIDER, Quickstart, Row
from moe_bench.steps import HUGGING_FACE


def steps_markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [
        "| side | precision | parameters, million | ms a step | tokens/s | x best Hugging Face | peak memory, MiB | without libraries, MiB | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = number(row.ms, row.note), number(row.tokens_per_second, row.note), number(row.over_best)
        own = None if row.peak_mib is None or row.before_mib is None else row.peak_mib - row.before_mib
        cells = row.side, row.precision, f"{row.parameters / 1e6:.1f}", *times, number(row.peak_mib), number(own), row.note
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def findings(rows: Sequence[Row]) -> list[str]:
    """What the table says about our step, a sentence each."""
    lines = []
    for precision in dict.fromkeys(row.precision for row in rows):
        by_side = {row.side: row for row in rows if row.precision == precision}
        theirs = [by_side[name] for name in HUGGING_FACE if name in by_side]
        best = max(theirs, key=lambda row: row.tokens_per_second)
        ours = by_side[OURS]
        lines.append(f"{precision}: ours has {number(ours.over_best)} times the tokens/s of the best Hugging Face side ({best.side}).")
        for row in theirs:
            lines += memory_sentence(precision, ours, row)
        if STRUCTMOE in by_side:
            structmoe, wider = by_side[STRUCTMOE], by_side[WIDER]
            same, as_many = number(structmoe.ms / ours.ms), number(structmoe.ms / wider.ms)
            lines.append(f"{precision}: a StructMoE step takes {same} times the step with plain experts of the same width.")
            lines.append(f"{precision}: a StructMoE step takes {as_many} times the step of the plain model with as many parameters.")
            lines += memory_sentence(precision, structmoe, wider)
    return lines


def memory_sentence(precision: str, row: Row, other: Row) -> list[str]:
    """Nothing where one of them was not measured."""
    if row.peak_mib is None or other.peak_mib is None or row.before_mib is None or other.before_mib is None:
        return []
    own = (row.peak_mib - row.before_mib) / (other.peak_mib - other.before_mib)
    whole = row.peak_mib / other.peak_mib
    return [f"{precision}: peak memory, {row.side} / {other.side}: {number(whole)}; without Python and libraries {number(own)}."]


def quickstart_markdown(result: Quickstart) -> str:
    """A table in Markdown."""
    return "\n".join(
        [
            "| quickstart | |",
            "|---|---|",
            f"| steps/s with `kernel_backends` all `reference` | {number(result.reference_steps_per_second)} |",
            f"| steps/s with `auto` | {number(result.auto_steps_per_second)} |",
            f"| auto / reference | {number(result.ratio)} |",
            f"| largest difference of the loss in {result.steps} steps | {result.largest_loss_difference:.1e} |",
            f"| the same for `reference` with all threads and with one (rounding alone) | {result.largest_difference_by_rounding:.1e} |",
            f"| difference of the loss in the last step | {result.last_loss_difference:.1e} (loss {result.last_loss:.3f}) |",
        ]
    )


def steps_plot(rows: Sequence[Row], path: Path) -> None:
    """Tokens/s and peak memory of every side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.3 * len(rows)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    colors = [f"C{list(dict.fromkeys(row.precision for row in rows)).index(row.precision)}" for row in rows]
    speed.barh(places, [row.tokens_per_second for row in rows], color=colors)
    memory.barh(places, [row.peak_mib or 0.0 for row in rows], color=colors)
    speed.set_yticks(places, [f"{row.side}, {row.precision}{' (estimated)' if row.note else ''}" for row in rows], fontsize=8)
    speed.invert_yaxis()
    speed.set_xlabel("tokens/s")
    memory.set_xlabel("peak memory, MiB")
    figure.savefig(path, dpi=100)
