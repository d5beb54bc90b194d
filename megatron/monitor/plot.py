"""Draws a plot of a run: the losses by step, and the balance of each MoE layer's experts."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path
from typing import Any

from megatron.monitor.jsonl import TRAIN_LOSS, read_jsonl

LOAD = "moe/expert_load"
FEW = 40
"""If there are at most this many points, each is drawn as a point."""
STEPS_PER_REACH = 80
"""The bold line is the mean over this part of the run: one fortieth."""


class NothingToDraw(ValueError):
    """The metrics file holds no loss."""


def plot_metrics(metrics_file: Path, picture: Path, *, title: str) -> None:
    """Draws `picture` (PNG) from a metrics.jsonl. The picture is written completely or not at all. Raises NothingToDraw if the metrics hold no
    loss."""
    from matplotlib.figure import Figure

    records = list(read_jsonl(metrics_file))
    train = _series(records, TRAIN_LOSS)
    if not train[0]:
        raise NothingToDraw(f"{metrics_file}: no line has train/lm_loss, so there is nothing to draw")
    loads = [(record["iteration"], record[LOAD]) for record in records if record.get(LOAD)]
    figure = Figure(figsize=(11, 4.2 if loads else 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(1, 2 if loads else 1, squeeze=False)[0]
    _draw_losses(axes[0], train, _series(records, "validation/lm_loss"))
    if loads:
        _draw_loads(axes[1], loads)
    picture = Path(os.path.realpath(picture))
    picture.parent.mkdir(parents=True, exist_ok=True)
    unfinished = picture.with_name(f".{picture.name}.new")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # a box stands for it
            figure.savefig(unfinished, format="png", dpi=120)
        os.replace(unfinished, picture)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(record["iteration"], record[key]) for record in records if record.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _draw_losses(axis: Any, train: tuple[list[int], list[float]], valid: tuple[list[int], list[float]]) -> None:
    """Every step's loss; over it the mean of the steps around each, in a run of so many steps that single ones are hard to follow."""
    steps, losses = train
    reach = len(steps) // STEPS_PER_REACH
    if reach:
        axis.plot(steps, losses, color="#9ecae1", linewidth=0.7, label="each step")
    axis.plot(steps, means_around(losses, reach), _line(steps), color="#08519c", linewidth=1.6, markersize=4, label="training")
    if valid[0]:
        axis.plot(*valid, "o-", color="#d94801", markersize=4, label="validation")
    _finish(axis, "loss (nats per token)", [*steps, *valid[0]])
    axis.legend()


def means_around(values: list[float], reach: int) -> list[float]:
    """For each value the mean of itself and of up to `reach` neighbours on each side. The line begins at the first value, where losses fall fast, and
    ends at the mean of the last `reach` + 1 values, where single ones are noise."""
    sums = [0.0, *itertools.accumulate(values)]
    bounds = [(place - min(reach, place), min(place + min(reach, place), len(values) - 1) + 1) for place in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in bounds]


def _line(steps: list[int]) -> str:
    """Points can be seen where there are few, and a single one is no line."""
    return "o-" if len(steps) <= FEW else "-"


def _finish(axis: Any, label: str, steps: list[int]) -> None:
    """Whole steps on the horizontal axis, which ends where the run does."""
    from matplotlib.ticker import MaxNLocator

    first, last = min(steps), max(steps)
    margin = 0.02 * (last - first) or 0.5
    axis.set(xlabel="step", ylabel=label, xlim=(first - margin, last + margin))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axis.grid(alpha=0.3)


def _draw_loads(axis: Any, loads: list[tuple[int, list[list[int]]]]) -> None:
    """Busiest expert over the mean, one line a layer: 1 is perfect balance."""
    steps = [step for step, _ in loads]
    layers = range(len(loads[0][1]))
    for layer in layers:
        imbalances = [_imbalance(load[layer]) for _, load in loads]
        axis.plot(steps, imbalances, _line(steps), linewidth=1.4, markersize=4, label=f"MoE layer {layer}")
    axis.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    _finish(axis, "busiest expert's load / mean load", steps)
    if len(layers) <= 12:
        axis.legend(fontsize="small")


def _imbalance(row: list[int]) -> float:
    return max(row) * len(row) / max(1, sum(row))
