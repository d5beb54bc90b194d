"""Measures the cases and makes a table, a plot and a verdict of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_bench.cases import GROUPED_MM, Case, all_cases
from moe_bench.layer_cost import LayerCost
from moe_bench.machine import Meter, Rates
from moe_bench.rooflines import least_seconds
from moe_bench.rounds import Measured, measure, ratio
from moe_bench.shapes import DTYPES, Inputs, Shape

NOISE = 1.10
"""`auto` may take this much longer than another implementation before it counts as slower."""


class Row(NamedTuple):
    """One implementation of one case."""

    op: str
    implementation: str
    dtype: str
    shape: str
    ms: float | None
    """None: it did not run; `note` says why."""
    over_reference: float | None
    """How many times as fast as the reference."""
    over_grouped_mm: float | None
    """How many times as fast as the same from `grouped_mm`. None: there is no such thing, or one of them did not run."""
    roofline: float | None
    """Least possible time over measured time."""
    note: str


class Slower(NamedTuple):
    """Where `auto` is not the fastest."""

    op: str
    dtype: str
    shape: str
    chosen: str
    faster: str
    ratio: float


def measure_shape(shape: Shape, dtype: str, meter: Meter, *, rounds: int, budget: float) -> tuple[list[Row], list[Slower], list[Rates]]:
    """Rows of every case of a shape; where `auto` is slower; and the machine's rates, measured once in every round."""
    inputs = Inputs(shape, DTYPES[dtype], meter.device)
    rows, slower, rates = [], [], []
    for case in all_cases():
        if not case.needs(inputs):
            continue
        now: list[Rates] = []
        times = measure(
            case.candidates(inputs),
            shape.tokens,
            rounds=rounds,
            budget=budget,
            device=meter.device,
            each_round=lambda: now.append(meter.measure(DTYPES[dtype])),  # noqa: B023 called before the next case
        )
        least = [least_seconds(case.cost(inputs.routed(shape.tokens), DTYPES[dtype].itemsize), each) for each in now]
        chosen = None if case.op is None else case.op.choose("auto", meter.device)
        rows += case_rows((case.name, dtype, shape.name), times, least, chosen)
        slower += check_auto(case, dtype, shape.name, times, meter.device)
        rates += now
    return rows, slower, rates


def case_rows(what: tuple[str, str, str], times: dict[str, Measured], least: Sequence[float], chosen: str | None) -> list[Row]:
    """`what`: op, dtype and shape. `least`: seconds of the roofline in each round. `chosen`: what `auto` stands for; None: it is a row of its own."""
    op, dtype, shape = what
    library = next((times[name] for name in (GROUPED_MM, "Hugging Face grouped_mm") if name in times), Measured(()))
    rows = []
    for name, measured in times.items():
        ratios = ratio(times["reference"], measured), ratio(library, measured)
        rows.append(
            Row(op, name, dtype, shape, measured.milliseconds, *ratios, roofline_share(measured, least), measured.note or "auto" * (name == chosen))
        )
    return rows


def roofline_share(measured: Measured, least: Sequence[float]) -> float | None:
    """The median over the rounds of least over measured time. None: it did not run."""
    if not measured.samples or not least:
        return None
    if measured.estimated:
        return statistics.median(least) / measured.samples[0]
    return statistics.median(limit / taken for limit, taken in zip(least, measured.samples, strict=True))


def check_auto(case: Case, dtype: str, shape: str, times: dict[str, Measured], device: str) -> list[Slower]:
    """Where another implementation takes less time than the one that `auto` stands for, by more than the noise."""
    if case.op is None:
        return []
    chosen = case.op.choose("auto", device)
    others = [name for name in times if name != chosen and any(name == each.name for each in case.op.implementations())]
    found = []
    for name in others:
        how_much = slower_by(times[chosen], times[name])
        if how_much is not None:
            found.append(Slower(case.name, dtype, shape, chosen, name, how_much))
    return found


def slower_by(chosen: Measured, other: Measured) -> float | None:
    """How many times as long the chosen one takes, if both the median ratio and the best times say that it is slower; infinity if it cannot run.
    None: it is not slower."""
    if not other.samples:
        return None
    if not chosen.samples:
        return float("inf")
    median = ratio(chosen, other)
    assert median is not None
    certain = min(median, min(chosen.samples) / min(other.samples))
    return median if certain > NOISE else None


# ---------------------------------------------------------------- for readers


def verdict(slower: Sequence[Slower]) -> str:
    """What the table says about `auto`."""
    lines = [f"auto is slower: {s.op}, {s.shape}, {s.dtype}: '{s.chosen}' takes {s.ratio:.2f} times as long as '{s.faster}'" for s in slower]
    return "\n".join(lines) or "auto always takes the fastest implementation, within 10 %."


def rate_sentences(meter: Meter, rates: Sequence[Rates], dtypes: Sequence[str]) -> list[str]:
    """What the rooflines are made of."""
    products = [f"{name} {rate / 1e9:.0f} GFLOP/s ({note})" for name in dtypes for rate, note in [meter.rate(DTYPES[name])]]
    bandwidth = statistics.median(each.bandwidth for each in rates) / 1e9
    return [f"Rates of this process: torch.mm {', '.join(products)}; memory {bandwidth:.1f} GB/s.", "A dtype that is emulated counts as fp32."]


def kernels_markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [
        "| op | implementation | dtype | shape | ms | x reference | x grouped_mm | of the roofline | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = number(row.ms, row.note), number(row.over_reference), number(row.over_grouped_mm), percent(row.roofline)
        lines.append(f"| {' | '.join((row.op, row.implementation, row.dtype, row.shape, *numbers, row.note))} |")
    return "\n".join(lines)


def layers_markdown(costs: Sequence[LayerCost]) -> str:
    """A table in Markdown."""
    lines = ["| implementation | dtype | shape | StructMoE, ms | plain, ms | StructMoE / plain |", "|---|---|---|---|---|---|"]
    lines += [f"| {c.implementation} | {c.dtype} | {c.shape} | {number(c.structmoe_ms)} | {number(c.plain_ms)} | {number(c.ratio)} |" for c in costs]
    return "\n".join(lines)


def number(value: float | None, note: str = "") -> str:
    """Three digits; a tilde before an estimate."""
    if value is None:
        return "-"
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"~{digits}" if note.startswith("estimated") else digits


def percent(share: float | None) -> str:
    """Of one."""
    return "-" if share is None else f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def kernels_plot(rows: Sequence[Row], path: Path) -> None:
    """A bar for each implementation: its share of the roofline; one panel for each shape and dtype."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.shape, row.dtype) for row in rows))
    shown = {panel: [row for row in rows if (row.shape, row.dtype) == panel and row.roofline is not None] for panel in panels}
    colors = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row.implementation for row in rows))}
    heights = [1 + 0.22 * len(shown[panel]) for panel in panels]
    figure = Figure(figsize=(10, sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        bars = shown[panel]
        places = range(len(bars))
        axis.barh(places, [100 * (row.roofline or 0) for row in bars], color=[colors[row.implementation] for row in bars])
        axis.set_yticks(places, [f"{row.op}: {row.implementation}" for row in bars], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(f"{panel[0]}, {panel[1]}", fontsize=9)
    axes[-1].set_xlabel("percent of the roofline (100: no program is faster)")
    figure.savefig(path, dpi=100)
