"""Charts as plain data: what is drawn, in which units. Nothing here draws; texts are as they are, and each form escapes them.

Shapes: Y rows; X columns; N points of a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

SEQUENTIAL = "viridis"
"""For amounts. Colour-blind people see its order too."""
DIVERGING = "RdBu_r"
"""For more and less than a middle: blue is less, red is more."""
TWO_TONE = "Blues"
"""For yes and no."""


@dataclass(frozen=True)
class Scale:
    """How the values of a heat map become colours. Maps side by side share one, so that they can be compared."""

    low: float
    high: float
    label: str
    """With its unit; stands at the bar of colours."""
    colours: str = SEQUENTIAL
    ticks: Sequence[tuple[float, str]] = ()
    """Places on the bar and their texts. Empty: chosen by the form."""
    bar: bool = True


@dataclass(frozen=True)
class HeatMap:
    """A matrix in colours, the first row at the top. NaN: nothing was measured, and nothing is drawn."""

    title: str
    value_YX: Floats
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    scale: Scale
    shown_YX: Floats | None = None
    """The number that a reader sees for a cell. None: the value."""
    decimals: int = 1
    unit: str = ""
    """Follows the number."""


@dataclass(frozen=True)
class Series:
    """One line, or one kind of bars. NaN: a gap."""

    name: str
    y: Floats
    colour: str
    dashed: bool = False
    """For what was not measured but is known, such as random choices."""
    low: Floats | None = None
    """With `high`: a band around a line, or the ends of an error bar. None: there is none."""
    high: Floats | None = None


@dataclass(frozen=True)
class Lines:
    """Values over numbers, or over names in their order."""

    title: str
    x: Sequence[float] | Sequence[str]
    series: Sequence[Series]
    x_label: str
    y_label: str
    y_range: tuple[float, float] | None = None
    """None: what the values need."""
    logarithmic_x: bool = False
    even: float | None = None
    """A dashed line across: where all experts are alike. None: there is none."""


@dataclass(frozen=True)
class Bars:
    """Groups of bars, a bar of each series at each name."""

    title: str
    names: Sequence[str]
    series: Sequence[Series]
    x_label: str
    y_label: str
    y_range: tuple[float, float] | None = None
    """None: what the values need."""
    even: float | None = None
    """A dashed line across: where all experts are alike. None: there is none."""


Chart = HeatMap | Lines | Bars


@dataclass(frozen=True)
class View:
    """Charts that are seen together. A figure with several views has a menu of their names."""

    name: str
    charts: Sequence[Chart]
    smallest: int = 340
    """The least width of a chart on the page, in CSS pixels."""


@dataclass(frozen=True)
class Figure:
    """Charts with what to see in them. It becomes a part of a page and a PNG of the same name."""

    name: str
    title: str
    views: Sequence[View]
    caption: str
    source: str = ""
    """The paper and its number. Empty: the picture is this project's."""
    menu: str = ""
    """What the views are, such as "Layer"."""
    group: str = ""
    """Menus of one group change together. Empty: this one alone."""
    legend: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Names and colours, where one legend serves several charts."""


def span_of(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest finite value; 0 and 1 if there is none."""
    finite = np.asarray(values, dtype=float).ravel()
    finite = finite[np.isfinite(finite)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def ratio_scale(label: str) -> Scale:
    """For the logarithm (base 2) of a number over its even value: white is even, and a quarter or four times is the end of the colours."""
    return Scale(-2.0, 2.0, label, DIVERGING, [(-2.0, "≤ ¼×"), (-1.0, "½×"), (0.0, "even"), (1.0, "2×"), (2.0, "≥ 4×")])


def ratio_colours(share: Floats, even: Floats | float) -> Floats:
    """The values for `ratio_scale`: log2(share / even), held within the scale, so that a share of 0 has the last colour."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.log2(np.asarray(share, dtype=np.float64) / even), -2.0, 2.0)
