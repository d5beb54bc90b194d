"""A picture of a run: losses over steps, and how evenly each MoE layer's experts were used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron.monitor.jsonl import TRAIN_LOSS, read_jsonl

LOAD = "moe/expert_load"


class NothingToDraw(ValueError):
    """A metrics file without a loss in it."""


def plot_metrics(metrics_file: Path, picture: Path, *, title: str) -> None:
    """Draws `picture` (PNG) from a metrics.jsonl. The file appears whole or not at all. Raises NothingToDraw when it has no loss."""
    from matplotlib.figure import Figure

    records = list(read_jsonl(metrics_file))
    train = _series(records, TRAIN_LOSS)
    if not train[0]:
        raise NothingToDraw(f"{metrics_file}: no line has train/lm_loss, so there is nothing to draw")
    loads = [(record["iteration"], record[LOAD]) for record in records if record.get(LOAD)]
    figure = Figure(figsize=(11, 4.2 if loads else 4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2 if loads else 1, squeeze=False)[0]
    _draw_losses(axes[0], train, _series(records, "validation/lm_loss"))
    if loads:
        _draw_loads(axes[1], loads)
    picture.parent.mkdir(parents=True, exist_ok=True)
    unfinished = picture.with_name(f".{picture.name}.new")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, picture)


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(record["iteration"], record[key]) for record in records if record.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _draw_losses(axis: Any, train: tuple[list[int], list[float]], valid: tuple[list[int], list[float]]) -> None:
    steps, losses = train
    axis.plot(steps, losses, color="#9ecae1", linewidth=0.7, label="each step")
    axis.plot(steps, _smooth(losses), color="#08519c", linewidth=1.6, label="training")
    if valid[0]:
        axis.plot(*valid, "o-", color="#d94801", markersize=4, label="validation")
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()


def _smooth(values: list[float], keep: float = 0.97) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def _draw_loads(axis: Any, loads: list[tuple[int, list[list[int]]]]) -> None:
    """Busiest expert over the mean, one line a layer: 1 is perfect balance."""
    steps = [step for step, _ in loads]
    layers = range(len(loads[0][1]))
    for layer in layers:
        axis.plot(steps, [_imbalance(load[layer]) for _, load in loads], linewidth=1.4, label=f"MoE layer {layer}")
    axis.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel="step", ylabel="busiest expert's load / mean load")
    axis.grid(alpha=0.3)
    if len(layers) <= 12:
        axis.legend(fontsize="small")


def _imbalance(row: list[int]) -> float:
    return max(row) * len(row) / max(1, sum(row))
