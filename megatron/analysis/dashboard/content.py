"""What the page says and shows, from runs to the parts of a page."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from megatron.analysis.dashboard import pictures
from megatron.analysis.dashboard.run import Run
from megatron.analysis.page import Choice, DataTable, Grid, Legend, Notice, Part, Plot, Section, Text
from megatron.monitor.alerts.alert import NAMES

ALERT_HEADING = "what was seen, and what to try"
NEWEST_ALERTS = 40
"""Alerts that the page lists; the newest come first."""
QUIET_SECONDS = 120.0
"""A run that has written nothing for so long is said to be quiet."""
COLUMNS = (
    ("loss", "train/lm_loss", ".4f"),
    ("validation", "validation/lm_loss", ".4f"),
    ("tokens/s", "runtime/tokens_per_sec", ",.0f"),
    ("learning rate", "train/learning_rate", ".2e"),
    ("gradient norm", "train/grad_norm", ".3g"),
    ("busiest expert", "moe/load_imbalance", ".2f"),
    ("ExRep", "moe/expert_replacement", ".1f"),
    ("entropy", "moe/router_entropy", ".2f"),
    ("dead experts", "moe/dead_experts", ".0f"),
    ("dead LoREs", "moe/dead_lores", ".0f"),
)
"""Heading, key and format of the table of runs. A column that no run has is left out."""


def sections(runs: Sequence[Run]) -> list[Section]:
    """All of the page."""
    found = [Section("Now", now(runs)), Section("Training", training(runs))]
    if routing := curves(pictures.ROUTING, runs):
        found.append(Section("Routing", [Text("Lines: the mean over the layers. Bands: the range over the layers."), routing]))
    if loads := per_run(runs, load_parts):
        found.append(
            Section("Load of the experts", [Text("Blue gets more than an even load, brown less. The newest log interval, and all of them."), *loads])
        )
    if layers := per_run(runs, layer_parts):
        found.append(Section("Layer by layer", layers))
    return found


def now(runs: Sequence[Run]) -> list[Part]:
    """Which runs there are, where they are, and what is wrong with them."""
    parts: list[Part] = [runs_table(runs)]
    parts += [Notice(f"{run.name}: {run.trouble}.", level="bad") for run in runs if run.trouble is not None]
    parts += [Notice(f"{run.name}: nothing yet. The page waits for {run.file.path}.") for run in runs if run.last_step < 0 and run.trouble is None]
    alerts = sorted(((alert["step"], run, alert) for run in runs for alert in run.alerts), key=lambda one: -one[0])
    if alerts:
        few = f"; the newest {NEWEST_ALERTS} are listed" if len(alerts) > NEWEST_ALERTS else ""
        parts.append(Notice(f"{len(alerts)} {'alert' if len(alerts) == 1 else 'alerts'}{few}.", level="bad"))
        rows = [[f"{step:,}", run.name, where(alert), f"{alert['seen']}\n{alert['try']}"] for step, run, alert in alerts[:NEWEST_ALERTS]]
        parts.append(DataTable(("step", "run", "alert", ALERT_HEADING), rows, numbers=False))
    elif any(run.last_step >= 0 for run in runs):
        parts.append(Notice("No alerts.", level="good"))
    return parts


def where(alert: dict[str, Any]) -> str:
    """The alert's kind and layer."""
    kind = NAMES.get(alert["kind"], alert["kind"])
    return kind if alert.get("layer") is None else f"{kind}, layer {alert['layer']}"


def runs_table(runs: Sequence[Run]) -> DataTable:
    """The newest numbers of each run."""
    shown = [column for column in COLUMNS if any(run.last(column[1]) is not None for run in runs)]
    rows = [
        [run.name, f"{run.last_step:,}" if run.last_step >= 0 else "", age(run), *(as_text(run.last(key), form) for _, key, form in shown)]
        for run in runs
    ]
    return DataTable(("run", "step", "last line", *(heading for heading, _, _ in shown)), rows)


def as_text(value: float | None, form: str) -> str:
    """For a reader. None: the run has no such number, and the cell is empty."""
    return "" if value is None else "NaN" if math.isnan(value) else format(value, form)


def age(run: Run) -> str:
    """How long ago the run has written."""
    try:
        seconds = max(0.0, time.time() - run.file.path.stat().st_mtime)
    except OSError:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "min" and seconds >= QUIET_SECONDS):
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def training(runs: Sequence[Run]) -> list[Part]:
    """Loss large, the others in a grid."""
    parts: list[Part] = []
    if len(runs) > 1:
        parts.append(Legend([(run.name, pictures.colour(place)) for place, run in enumerate(runs)]))
    if loss := pictures.loss_picture(runs):
        parts.append(Text("Thin: every step. Bold: the mean of the steps around it. Points: validation and test. Red triangles: alerts."))
        parts.append(Plot(loss, "The loss over the steps.", height=420))
    if (grid := curves(pictures.TRAINING, runs)) is not None:
        parts.append(grid)
    return parts or [Text("There are no numbers yet.")]


def curves(chosen: Sequence[pictures.Curve], runs: Sequence[Run]) -> Grid | None:
    """The pictures side by side. None: no run has any of these numbers."""
    drawn = [(curve, pictures.curve_picture(curve, runs)) for curve in chosen]
    plots = [Plot(figure, curve.says, height=280) for curve, figure in drawn if figure is not None]
    return Grid(plots, smallest=340) if plots else None


def per_run(runs: Sequence[Run], parts_of: Any) -> list[Part]:
    """The parts of a run; with several runs a menu of them."""
    options = [(run.name, parts) for run in runs if (parts := parts_of(run))]
    if len(options) == 1:
        return list(options[0][1])
    return [Choice("Run", options, group="run")] if options else []


def load_parts(run: Run) -> list[Part]:
    """Heat maps of the loads of experts and LoREs."""
    lores = len(run.table("moe/lore_load")) > 0
    drawn = [
        (pictures.load_now_picture(run, "moe/expert_load", "Load of each expert now", "expert"), "Load of each expert in the newest log interval."),
        (pictures.load_now_picture(run, "moe/lore_load", "Load of each LoRE now", "LoRE (expert by expert)"), "Load of each LoRE.")
        if lores
        else (None, ""),
    ]
    plots = [Plot(figure, says, height=heat_height(len(figure["data"][0]["y"]))) for figure, says in drawn if figure is not None]
    parts: list[Part] = [Grid(plots, smallest=420)] if plots else []
    if (figure := pictures.load_over_time_picture(run)) is not None:
        parts.append(Plot(figure, "Load of each expert over the steps.", height=heat_height(len(figure["data"][0]["y"]))))
    return parts


def heat_height(rows: int) -> int:
    """CSS pixels for so many rows."""
    return min(900, max(240, 110 + 16 * rows))


def layer_parts(run: Run) -> list[Part]:
    """Heat maps of the numbers of each layer."""
    drawn = [(curve, pictures.layers_picture(curve, run)) for curve in pictures.ROUTING]
    plots = [
        Plot(figure, f"{curve.says} By layer.", height=heat_height(len(figure["data"][0]["y"]))) for curve, figure in drawn if figure is not None
    ]
    return [Grid(plots, smallest=420)] if plots else []
