"""Figures as PNGs, drawn by matplotlib."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.analysis.charts.chart import TWO_TONE, Bars, Chart, Figure, HeatMap, Lines, View

ACROSS = 3
"""Charts in a row, at most."""
VIEWS = 4
"""Of a figure with a menu of more than these, the first, the middle and the last view are drawn."""
CHARTS = 9
"""In one PNG, at most, unless one view has more."""
DPI = 130
FEW_COLUMNS, FEW_ROWS = 12, 12
POINTS = 40
SETTINGS: dict[Any, Any] = {"text.parse_math": False, "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}


def write_picture(figure: Figure, path: Path) -> None:
    """Writes a PNG, completely or not at all. Raises OSError."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    views = chosen(figure.views)
    rows = [(view, charts) for view in views for charts in _rows(view)]
    across = max(len(charts) for _, charts in rows)
    wide = 4.3 if across > 1 else 8.0
    heights = [max(_height(chart) for chart in charts) for _, charts in rows]
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # a box stands for it
        canvas = Canvas(figsize=(wide * across, sum(heights) + 0.8), layout="constrained")
        canvas.suptitle(drawable(figure.title), fontsize=12, fontweight="bold")
        grid = canvas.subplots(len(rows), across, squeeze=False, height_ratios=heights)
        for place, (view, charts) in enumerate(rows):
            for axis in grid[place][len(charts) :]:
                axis.set_axis_off()
            for axis, chart in zip(grid[place], charts, strict=False):
                lead = f"{figure.menu} {view.name}" if len(views) > 1 else ""
                _draw(axis, chart, lead, legend=not figure.legend)
        if figure.legend:
            _legend(canvas, figure.legend)
        _save(canvas, path)


def chosen(views: Sequence[View]) -> list[View]:
    """All if they are few, else the first, the middle and the last; the first alone, where those would be too many charts."""
    places = sorted({0, (len(views) - 1) // 2, len(views) - 1}) if len(views) > VIEWS else range(len(views))
    if len(views[0].charts) * len(places) > CHARTS:
        return [views[0]]
    return [views[place] for place in places]


def drawable(text: str) -> str:
    """matplotlib refuses a text with half a character, which the name of a file can hold: "?" stands for it."""
    return text.encode("utf-8", "replace").decode()


def _rows(view: View) -> list[Sequence[Chart]]:
    """Charts that need more room than a third of the width stand below each other."""
    across = 1 if view.smallest > 600 else 2 if len(view.charts) in (2, 4) else ACROSS
    return [view.charts[begin : begin + across] for begin in range(0, len(view.charts), across)]


def _height(chart: Chart) -> float:
    """In inches."""
    return float(np.clip(1.2 + 0.22 * len(chart.rows), 2.2, 6.0)) if isinstance(chart, HeatMap) else 2.9


def _save(canvas: Any, path: Path) -> None:
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name}.new")
    # Laid out here, it is drawn once; `savefig` would draw it twice.
    canvas.get_layout_engine().execute(canvas)
    canvas.set_layout_engine("none")
    try:
        canvas.savefig(unfinished, format="png", dpi=DPI, metadata={"Software": None})
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _legend(canvas: Any, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=drawable(name)) for name, colour in entries]
    canvas.legend(handles=handles, loc="outside lower center", ncols=min(len(entries), 6), frameon=False)


def _draw(axis: Any, chart: Chart, lead: str, *, legend: bool) -> None:
    axis.set_title(drawable(", ".join(filter(None, (lead, chart.title)))), loc="left")
    axis.set_xlabel(drawable(chart.x_label))
    axis.set_ylabel(drawable(chart.y_label))
    if isinstance(chart, HeatMap):
        _draw_heat_map(axis, chart)
        return
    if isinstance(chart, Bars):
        _draw_bars(axis, chart)
    else:
        _draw_lines(axis, chart)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    if chart.even is not None:
        axis.axhline(chart.even, color="#7f7f7f", linewidth=1.2, linestyle="--")
    if chart.y_range is not None:
        axis.set_ylim(*chart.y_range)
    if legend and sum(bool(series.name) for series in chart.series) > 1:
        axis.legend(fontsize="small", frameon=False)


def _draw_heat_map(axis: Any, chart: HeatMap) -> None:
    from matplotlib.colors import ListedColormap

    colours = chart.scale.colours if chart.scale.colours != TWO_TONE else ListedColormap(["#ececec", "#0072b2"])
    image = axis.imshow(chart.value_YX, cmap=colours, vmin=chart.scale.low, vmax=chart.scale.high, aspect="auto", interpolation="nearest")
    if max(map(len, chart.columns), default=0) > 4:
        _name(axis.set_xticks, chart.columns, 64)
        axis.tick_params(axis="x", labelrotation=90, labelsize=7)
    else:
        _name(axis.set_xticks, chart.columns, 12)
    _name(axis.set_yticks, chart.rows, 26)
    axis.spines[:].set_visible(False)
    if chart.scale.bar:
        bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(chart.scale.label)
        if chart.scale.ticks:
            bar.set_ticks([place for place, _ in chart.scale.ticks], labels=[text for _, text in chart.scale.ticks])
    if len(chart.columns) > FEW_COLUMNS or len(chart.rows) > FEW_ROWS or chart.scale.colours == TWO_TONE:
        return
    shown = chart.value_YX if chart.shown_YX is None else chart.shown_YX
    for (y, x), value in np.ndenumerate(chart.value_YX):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = axis.text(x, y, f"{shown[y, x]:.{chart.decimals}f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
            text.set_in_layout(False)  # it lies in its cell; to measure each takes seconds


def _name(ticks: Any, names: Sequence[str], most: int) -> None:
    """At most so many names, evenly spread."""
    step = -(-len(names) // most)
    places = range(0, len(names), step)
    ticks(places, labels=[drawable(names[place]) for place in places])


def _draw_bars(axis: Any, chart: Bars) -> None:
    width = 0.8 / max(1, len(chart.series))
    places = np.arange(len(chart.names))
    for number, one in enumerate(chart.series):
        at = places + (number - (len(chart.series) - 1) / 2) * width
        axis.bar(at, one.y, width * 0.95, color=one.colour, label=drawable(one.name))
        if one.low is not None and one.high is not None:
            axis.errorbar(at, one.y, yerr=[one.y - one.low, one.high - one.y], fmt="none", ecolor="#333333", elinewidth=1.0, capsize=3)
    axis.set_xlim(-0.5, len(chart.names) - 0.5)  # also where the last bars are NaN
    _name(axis.set_xticks, chart.names, 16)


def _draw_lines(axis: Any, chart: Lines) -> None:
    from matplotlib.ticker import NullLocator

    numbers = all(isinstance(one, int | float) for one in chart.x)
    x = list(chart.x) if numbers else list(range(len(chart.x)))
    for one in chart.series:
        marker = "o" if len(x) <= POINTS and not one.dashed else ""
        axis.plot(
            x, one.y, marker=marker, markersize=3.5, linestyle="--" if one.dashed else "-", linewidth=1.6, color=one.colour, label=drawable(one.name)
        )
        if one.low is not None and one.high is not None:
            axis.fill_between(x, one.low, one.high, color=one.colour, alpha=0.22, linewidth=0)
    if chart.logarithmic_x:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    if not numbers or len(x) <= POINTS // 2:
        _name(lambda places, labels: axis.set_xticks([x[place] for place in places], labels=labels), [_plain(one) for one in chart.x], 12)


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
