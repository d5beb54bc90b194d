"""Charts as parts of a page: dictionaries for Plotly, and figures with their menus."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron.analysis.charts.chart import DIVERGING, SEQUENTIAL, TWO_TONE, Bars, Chart, Figure, HeatMap, Lines, Series, View
from megatron.analysis.page import Captioned, Choice, Grid, Legend, Part, Plot, plotly_text

# Plotly has other colours than matplotlib under the last two names. These are ColorBrewer's.
RED_BLUE = ("#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f")
SCALES: dict[str, Any] = {
    SEQUENTIAL: "Viridis",
    DIVERGING: [[place / (len(RED_BLUE) - 1), colour] for place, colour in enumerate(RED_BLUE)],
    TWO_TONE: [[0, "rgba(127,127,127,0.14)"], [1, "#0072b2"]],
}
FEW_COLUMNS, FEW_ROWS = 12, 24
"""A heat map with at most so many shows its numbers in the cells."""
POINTS = 40
"""A line with at most so many points shows each."""
TITLE_LETTERS = 42
"""A longer title is broken into lines: a telephone cuts off what does not fit."""
TITLE_LINE = 18
"""Height of such a line in CSS pixels."""


def page_part(figure: Figure) -> Captioned:
    """The figure as a part of a page, with a link to its PNG."""
    parts: list[Part] = [Legend(figure.legend)] if figure.legend else []
    if len(figure.views) > 1:
        parts.append(Choice(figure.menu, [(view.name, [_grid(view, legend=not figure.legend)]) for view in figure.views], figure.group))
    else:
        parts.extend(_grid(view, legend=not figure.legend) for view in figure.views)
    return Captioned(figure.title, parts, figure.caption, figure.source, f"{figure.name}.png")


def _grid(view: View, *, legend: bool) -> Grid:
    return Grid([plot(chart, legend=legend) for chart in view.charts], view.smallest)


def plot(chart: Chart, *, legend: bool = True) -> Plot:
    """One chart for Plotly. `legend`: whether its series are named in it."""
    if isinstance(chart, HeatMap):
        data, layout, height = _heat_map(chart)
    elif isinstance(chart, Bars):
        data, layout, height = _bars(chart)
    else:
        data, layout, height = _lines(chart)
    series = () if isinstance(chart, HeatMap) else chart.series
    named = legend and sum(bool(one.name) for one in series) > 1
    lines = textwrap.wrap(chart.title, TITLE_LETTERS)
    layout |= {"title": {"text": "<br>".join(map(plotly_text, lines))}, "showlegend": named}
    if len(lines) > 1:
        layout["margin"] = {"l": 56, "r": 16, "t": 36 + TITLE_LINE * (len(lines) - 1), "b": 48}
        height += TITLE_LINE * (len(lines) - 1)
    if not chart.title:
        layout["margin"] = {"l": 56, "r": 16, "t": 14, "b": 48}
        height -= 22
    if named:
        layout["legend"] = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
        height += 20 * -(-len(series) // 3)
    label = f"{chart.title}: {chart.y_label} by {chart.x_label}".removeprefix(": ")
    return Plot({"data": data, "layout": layout}, label=label, height=height)


def packed(values: Any) -> dict[str, Any]:
    """An array in Plotly's base64 form, with 32 bits a number."""
    array = np.ascontiguousarray(values, dtype="<f4")
    shape = {"shape": ", ".join(map(str, array.shape))} if array.ndim > 1 else {}
    return {"dtype": "f4", "bdata": base64.b64encode(array.tobytes()).decode(), **shape}


def _names(names: Sequence[str]) -> list[str]:
    return [plotly_text(name) for name in names]


def _heat_map(chart: HeatMap) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    shown = chart.value_YX if chart.shown_YX is None else chart.shown_YX
    number = f"%{{customdata:.{chart.decimals}f}}"
    bar: dict[str, Any] = {"title": {"text": plotly_text(chart.scale.label), "side": "right"}, "thickness": 12, "outlinewidth": 0}
    if chart.scale.ticks:
        bar |= {"tickvals": [place for place, _ in chart.scale.ticks], "ticktext": [text for _, text in chart.scale.ticks]}
    trace = {
        "type": "heatmap",
        "z": packed(chart.value_YX),
        "customdata": packed(shown),
        "x": _names(chart.columns),
        "y": _names(chart.rows),
        "zmin": chart.scale.low,
        "zmax": chart.scale.high,
        "colorscale": SCALES[chart.scale.colours],
        "colorbar": bar,
        "showscale": chart.scale.bar,
        "hoverongaps": False,
        "hovertemplate": f"{_one(chart.y_label)} %{{y}}, {_one(chart.x_label)} %{{x}}: {number}{chart.unit}<extra></extra>",
        **({"xgap": 1, "ygap": 1} if max(len(chart.columns), len(chart.rows)) <= 64 else {}),
    }
    if len(chart.columns) <= FEW_COLUMNS and len(chart.rows) <= FEW_ROWS and chart.scale.colours != TWO_TONE:
        trace |= {"text": _cell_texts(chart, shown), "texttemplate": "%{text}"}
    axis = {"type": "category", "showgrid": False}
    layout = {
        "xaxis": {**axis, "title": {"text": plotly_text(chart.x_label)}},
        "yaxis": {**axis, "title": {"text": plotly_text(chart.y_label)}, "autorange": "reversed"},
    }
    return [trace], layout, int(np.clip(110 + 24 * len(chart.rows), 230, 620))


def _cell_texts(chart: HeatMap, shown: Any) -> list[list[str]]:
    return [[f"{value:.{chart.decimals}f}" if np.isfinite(value) else "" for value in row] for row in shown]


def _one(label: str) -> str:
    """An axis' label without its unit."""
    return plotly_text(label.split(" (")[0])


def _bars(chart: Bars) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    traces = [
        {
            "type": "bar",
            "x": _names(chart.names),
            "y": packed(one.y),
            "name": plotly_text(one.name),
            "marker": {"color": one.colour, "line": {"width": 0}},
            **_error_bars(one),
        }
        for one in chart.series
    ]
    layout = _axes(chart)
    layout |= {"barmode": "group", "bargap": 0.25, "bargroupgap": 0.05}
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    return [one | {"hovertemplate": _hover(chart)} for one in traces], layout, 330


def _error_bars(one: Series) -> dict[str, Any]:
    """From `low` to `high`, where the series has them."""
    if one.low is None or one.high is None:
        return {}
    ends = {"array": packed(one.high - one.y), "arrayminus": packed(one.y - one.low)}
    return {"error_y": {"type": "data", "symmetric": False, "thickness": 1.2, "width": 4, **ends}}


def _lines(chart: Lines) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    numbers = all(isinstance(one, int | float) for one in chart.x)
    x: Any = packed(chart.x) if numbers else _names([str(one) for one in chart.x])
    traces = []
    for one in chart.series:
        if one.low is not None and one.high is not None:
            traces += _band(one, x)
        line = {"color": one.colour, "width": 1.5 if one.dashed else 2, **({"dash": "dash"} if one.dashed else {})}
        mode = "lines+markers" if (len(chart.x) <= POINTS and not one.dashed) or len(chart.x) == 1 else "lines"
        traces.append(
            {
                "type": "scatter",
                "mode": mode,
                "x": x,
                "y": packed(one.y),
                "name": plotly_text(one.name),
                "showlegend": bool(one.name),
                "line": line,
                "hovertemplate": _hover(chart),
            }
        )
    layout = _axes(chart)
    if not numbers:
        layout["xaxis"]["type"] = "category"
    elif chart.logarithmic_x:
        layout["xaxis"] |= {"type": "log", "tickvals": list(chart.x), "ticktext": [f"{one:g}" for one in chart.x if isinstance(one, int | float)]}
    elif len(chart.x) <= POINTS // 2:
        layout["xaxis"]["tickvals"] = list(chart.x)
    return traces, layout, 330


def _band(one: Series, x: Any) -> list[dict[str, Any]]:
    """Two lines that cannot be seen, and the colour between them."""
    edge = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    red, green, blue = (int(one.colour[place : place + 2], 16) for place in (1, 3, 5))
    return [edge | {"y": packed(one.low)}, edge | {"y": packed(one.high), "fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.22)"}]


def _hover(chart: Lines | Bars) -> str:
    return f"{_one(chart.x_label)} %{{x}}: %{{y:.3~f}}"


def _axes(chart: Lines | Bars) -> dict[str, Any]:
    y: dict[str, Any] = {"title": {"text": plotly_text(chart.y_label)}}
    if chart.y_range is not None:
        y["range"] = list(chart.y_range)
    layout: dict[str, Any] = {"xaxis": {"title": {"text": plotly_text(chart.x_label)}}, "yaxis": y}
    if chart.even is not None:
        line = {"color": "#7f7f7f", "width": 1.5, "dash": "dash"}
        layout["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": chart.even, "y1": chart.even, "line": line}]
    return layout
