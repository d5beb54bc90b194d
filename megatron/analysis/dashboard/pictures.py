"""The pictures of the page, as dictionaries for Plotly. A picture without data is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.analysis.dashboard.run import Numbers, Run
from megatron.analysis.dashboard.thin import Steps, extremes, smoothed
from megatron.analysis.page import COLOURS, plotly_text

BUCKETS = 600
"""Parts of the x axis: about as many as a picture has pixels."""
SMOOTHING = 100
"""The bold line is the mean over this part of the run on each side."""
FEW = 40
"""With at most this many points each is drawn as a point."""
MOST_ROWS = 128
"""Rows of a heat map over time."""
DIVERGING = [[0.0, "#b35806"], [0.25, "#f1a340"], [0.5, "#f7f7f7"], [0.75, "#67a9cf"], [1.0, "#2166ac"]]
"""Too little, even, too much."""
SEQUENTIAL = "Viridis"
LARGEST_RATIO = 4.0
"""Loads are coloured from a quarter of an even load to four times as much."""


@dataclass(frozen=True)
class Curve:
    """A picture of one number over the steps."""

    title: str
    key: str
    unit: str
    says: str
    """What it shows, in one sentence."""
    band: bool = False
    """Whether the range over layers is drawn too."""
    log: bool = False
    count: bool = False
    """Whether it counts something, so that the axis begins at 0."""
    exact: bool = False
    """Whether the number has no noise."""
    constant_is_known: bool = False
    """Whether a number that is the same at every step says nothing new."""


TRAINING = (
    Curve("Throughput", "runtime/tokens_per_sec", "tokens per second", "Tokens per second over the steps."),
    Curve("Gradient norm", "train/grad_norm", "norm before clipping", "Gradient norm before clipping over the steps.", log=True),
    Curve("Learning rate", "train/learning_rate", "learning rate", "Learning rate over the steps.", exact=True),
)
ROUTING = (
    Curve("Busiest expert", "moe/load_imbalance", "load / even load", "Load of the busiest expert over an even load. 1 is even.", band=True),
    Curve("Delta uniform", "moe/delta_uniform", "percent", "Mean distance of an expert's share from an even one (CoSMoEs).", band=True),
    Curve("Router entropy", "moe/router_entropy", "nats", "Entropy of the routers' probabilities.", band=True),
    Curve("Expert replacement (ExRep)", "moe/expert_replacement", "percent", "Experts that the token before did not use (CoSMoEs).", band=True),
    Curve("Dead experts", "moe/dead_experts", "experts", "Experts without a token in a log interval, in all layers.", count=True),
    Curve("Dead LoREs", "moe/dead_lores", "LoREs", "LoREs without a token in a log interval, in all layers.", count=True),
    Curve("Busiest process", "moe/process_overload", "rows / mean", "Rows of the busiest expert-parallel process over the mean.", band=True),
    Curve("Experts per token", "moe/experts_per_token", "experts", "Mean number of experts that a token uses.", band=True, constant_is_known=True),
)


def colour(place: int) -> str:
    """Of the run with this number."""
    return COLOURS[place % len(COLOURS)]


def layout(curve_title: str, unit: str, *, log: bool = False) -> dict[str, Any]:
    """Steps below, the number on the left. `uirevision` keeps the reader's zoom when new data come."""
    return {
        "title": {"text": plotly_text(curve_title)},
        "xaxis": {"title": {"text": "step"}, "rangemode": "normal"},
        "yaxis": {"title": {"text": unit}, "type": "log" if log else "linear", "exponentformat": "power" if log else "SI"},
        "showlegend": False,
        "hovermode": "closest",
        "uirevision": "kept",
        "margin": {"l": 64, "r": 12, "t": 36, "b": 44},
    }


def line(x: Steps, y: Numbers, *, name: str, colour: str, **style: Any) -> dict[str, Any]:
    """A curve thinned out."""
    kept = extremes(x, y, buckets=BUCKETS)
    mode = "lines+markers" if len(x) <= FEW else "lines"
    look = {"color": colour, "width": style.pop("width", 1.8)}
    hover = f"{plotly_text(name)}<br>step %{{x:,}}<br>%{{y:.5g}}<extra></extra>"
    return {"type": "scatter", "mode": mode, "x": small(x[kept]), "y": y[kept].astype(np.float32), "line": look, "hovertemplate": hover, **style}


def noisy_lines(x: Steps, y: Numbers, *, name: str, colour: str) -> list[dict[str, Any]]:
    """A thin line of all points and a bold one of the means around them, so that noise does not hide the other runs. With few points: one line."""
    reach = len(x) // SMOOTHING
    if reach < 2:
        return [line(x, y, name=name, colour=colour)] if len(x) else []
    thin = line(x, y, name=f"{name}, each step", colour=colour, width=0.8, opacity=0.35)
    return [thin, line(x, smoothed(y, reach=reach), name=f"{name}, mean around the step", colour=colour, width=2.2)]


def small(x: Steps) -> Any:
    """In 32 bits if they fit, so that the page is small."""
    return x.astype(np.int32) if not len(x) or x[-1] < 2**31 else x.astype(np.float64)


def curve_picture(curve: Curve, runs: Sequence[Run]) -> dict[str, Any] | None:
    """One line for each run, and for a number of each layer the range over the layers as a band."""
    data: list[dict[str, Any]] = []
    for place, run in enumerate(runs):
        x, y = run.column(curve.key)
        if not len(x):
            continue
        if curve.band:
            data += band(run, curve.key, colour(place))
        data += [line(x, y, name=run.name, colour=colour(place))] if curve.exact else noisy_lines(x, y, name=run.name, colour=colour(place))
    if not data or (curve.constant_is_known and all(is_constant(run.column(curve.key)[1]) for run in runs)):
        return None
    shown = layout(curve.title, curve.unit, log=curve.log)
    if curve.count:
        shown["yaxis"] |= {"rangemode": "tozero", "minallowed": 0}
    return {"data": data, "layout": shown}


def is_constant(y: Numbers) -> bool:
    """Whether all numbers are the same."""
    return not len(y) or bool((y == y[0]).all())


def band(run: Run, key: str, colour: str) -> list[dict[str, Any]]:
    """The range over the layers."""
    (x, low), (_, high) = run.column(f"{key}/min"), run.column(f"{key}/max")
    if len(x) < 2 or len(low) != len(high) or np.array_equal(low, high):
        return []
    kept = np.union1d(extremes(x, low, buckets=BUCKETS // 2), extremes(x, high, buckets=BUCKETS // 2))
    edge = {"type": "scatter", "mode": "lines", "x": small(x[kept]), "line": {"width": 0}, "hoverinfo": "skip"}
    upper = {**edge, "y": high[kept].astype(np.float32), "fill": "tonexty", "fillcolor": faded(colour)}
    return [{**edge, "y": low[kept].astype(np.float32)}, upper]


def faded(colour: str) -> str:
    """The colour of a band."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def loss_picture(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Each step's loss, thin; over it the mean of the steps around each; the validation losses as points; the alerts as triangles."""
    data: list[dict[str, Any]] = []
    for place, run in enumerate(runs):
        x, y = run.column("train/lm_loss")
        data += noisy_lines(x, y, name=f"{run.name}, training", colour=colour(place))
        for name, symbol in (("validation", "circle"), ("test", "square")):
            steps, losses = run.column(f"{name}/lm_loss")
            if len(steps):
                look = {"size": 7, "symbol": symbol, "color": colour(place), "line": {"width": 1.5, "color": "#ffffff"}}
                mode = {"mode": "lines+markers" if len(steps) > 1 else "markers", "marker": look}
                data.append({**line(steps, losses, name=f"{run.name}, {name}", colour=colour(place), width=1, dash="dot"), **mode})
        data += alert_marks(run, x, y)
    return {"data": data, "layout": layout("Loss", "nats per token")} if data else None


def alert_marks(run: Run, x: Steps, y: Numbers) -> list[dict[str, Any]]:
    """A red triangle at the loss of each step with an alert."""
    if not run.alerts or not len(x):
        return []
    texts: dict[int, list[str]] = {}
    for alert in run.alerts:
        texts.setdefault(alert["step"], []).append(f"{alert['kind'].replace('_', ' ')}: {alert['seen']}")
    steps = np.array(sorted(texts), dtype=np.int64)
    finite = np.isfinite(y)
    heights = np.interp(steps, x[finite], y[finite]) if finite.any() else np.zeros(len(steps))
    words = [plotly_text(f"{run.name}, step {step:,}: " + " ".join(texts[int(step)]))[:600] for step in steps]
    look = {"symbol": "triangle-down", "size": 11, "color": "#d62728", "line": {"width": 1, "color": "#ffffff"}}
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": small(steps),
            "y": heights,
            "marker": look,
            "text": words,
            "hovertemplate": "%{text}<extra></extra>",
        }
    ]


def layers_picture(curve: Curve, run: Run) -> dict[str, Any] | None:
    """A heat map: layers upwards, steps to the right."""
    steps, values_SX = run.matrix(f"{curve.key}_by_layer")
    if len(steps) < 2 or values_SX.shape[1] < 2 or np.nanmin(values_SX) == np.nanmax(values_SX):
        return None
    data = {"type": "heatmap", "x": steps, "y": [f"layer {i}" for i in range(values_SX.shape[1])], "z": values_SX.T.astype(np.float32)}
    look = {"colorscale": SEQUENTIAL, "colorbar": bar(curve.unit), "hovertemplate": "%{y}<br>step %{x:,}<br>%{z:.4g}<extra></extra>"}
    return {"data": [{**data, **look}], "layout": heat_layout(curve.title, "step", left=64)}


def bar(title: str, ticks: dict[str, Any] | None = None) -> dict[str, Any]:
    """The legend of a heat map's colours."""
    return {"title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0, **(ticks or {})}


def load_now_picture(run: Run, key: str, title: str, name: str) -> dict[str, Any] | None:
    """A heat map of the newest log interval: layers upwards, experts (or LoREs) to the right."""
    rows = run.table(key)
    if not rows:
        return None
    return heat(title, ratios(rows), x=list(range(max(map(len, rows)))), y=[f"layer {i}" for i in range(len(rows))], x_title=name)


def load_over_time_picture(run: Run) -> dict[str, Any] | None:
    """A heat map: the experts of all layers upwards, steps to the right. With more than 128 experts the busiest and the idlest of each layer."""
    steps, tables = run.tables("moe/expert_load")
    if len(steps) < 2:
        return None
    logs = [ratios(rows) for rows in tables]
    names = [f"layer {layer}, expert {expert}" for layer, row in enumerate(tables[-1]) for expert in range(len(row))]
    columns = [np.concatenate([row[: len(one)] for row, one in zip(log, rows, strict=True)]) for log, rows in zip(logs, tables, strict=True)]
    if len(names) > MOST_ROWS:
        ends = (("idlest", np.nanmin), ("busiest", np.nanmax))
        names = [f"layer {layer}, {name}" for layer in range(len(tables[-1])) for name, _ in ends]
        columns = [np.array([choose(row) for row in log for _, choose in ends]) for log in logs]
    figure = heat("Load of each expert over time", np.array(columns).T, x=steps, y=names, x_title="step")
    figure["data"][0] |= {"customdata": None, "hovertemplate": "%{y}<br>step %{x:,}<br>2^%{z:.2f} times an even load<extra></extra>"}  # half as large
    return figure


def ratios(rows: list[Numbers]) -> Numbers:
    """log2 of load over even load, (layers, experts); NaN beyond a layer's own experts. An expert without load gets the smallest number."""
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        if row.sum() > 0:
            found[place, : len(row)] = np.log2(np.maximum(row * len(row) / row.sum(), 2.0**-10))
    return found


def heat(title: str, log_ratio: Numbers, *, x: list[int], y: list[str], x_title: str) -> dict[str, Any]:
    """Colours of load over even load; the hover text has the number itself."""
    largest = float(np.log2(LARGEST_RATIO))
    ticks = {"tickvals": [-largest, -1, 0, 1, largest], "ticktext": ["¼", "½", "even", "2×", "4×"]}
    data = {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": log_ratio.astype(np.float32),
        "customdata": np.exp2(log_ratio).round(3).astype(np.float32),
        "zmin": -largest,
        "zmax": largest,
        "colorscale": DIVERGING,
        "colorbar": bar("load / even load", ticks),
        "hovertemplate": f"%{{y}}<br>{x_title} %{{x}}<br>%{{customdata:.3g}} times an even load<extra></extra>",
    }
    return {"data": [data], "layout": heat_layout(title, x_title, left=110)}


def heat_layout(title: str, x_title: str, *, left: int) -> dict[str, Any]:
    """Names upwards; the first one is at the bottom."""
    axes = {"xaxis": {"title": {"text": x_title}, "showgrid": False}, "yaxis": {"type": "category", "showgrid": False}}
    return {**layout(title, ""), **axes, "margin": {"l": left, "r": 12, "t": 36, "b": 44}}
