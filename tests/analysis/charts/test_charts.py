"""Charts as data become dictionaries for Plotly and PNGs: the numbers are those that were given, and no text is code."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron.analysis.charts.chart import Bars, Figure, HeatMap, Lines, Scale, Series, View, ratio_colours, ratio_scale
from megatron.analysis.charts.interactive import page_part, plot
from megatron.analysis.charts.picture import chosen, write_picture
from megatron.analysis.page import Choice
from tests.browser import colours_in

EVIL = "</script><b>$x_1$</b>"
VALUES = np.array([[0.0, 1.0], [np.nan, 4.0]])


def heat_map(title: str = "share", **settings: Any) -> HeatMap:
    return HeatMap(title, VALUES, "expert", "layer", ["0", EVIL], ["a", "b"], Scale(0, 4, "percent"), **settings)


def lines(title: str = "loss") -> Lines:
    series = [
        Series("one", np.array([1.0, np.nan, 3.0]), "#0072b2", low=np.zeros(3), high=np.ones(3)),
        Series(EVIL, np.ones(3), "#7f7f7f", dashed=True),
    ]
    return Lines(title, [1, 2, 4], series, "step", "loss (nats)", even=1.0, logarithmic_x=True)


def bars(title: str = "bars") -> Bars:
    return Bars(
        title, ["0", EVIL], [Series("one", np.array([1.0, 2.0]), "#0072b2"), Series("two", np.array([2.0, 0.5]), "#e69f00")], "expert", "share (%)"
    )


def unpacked(packed: dict[str, Any]) -> Any:
    array = np.frombuffer(base64.b64decode(packed["bdata"]), dtype="<f4")
    return array.reshape([int(size) for size in packed["shape"].split(",")]) if "shape" in packed else array


def test_a_heat_map_s_colours_and_numbers_are_those_given() -> None:
    (trace,) = plot(heat_map(shown_YX=VALUES * 10, unit=" %")).figure["data"]
    np.testing.assert_array_equal(unpacked(trace["z"]), VALUES.astype(np.float32))
    np.testing.assert_array_equal(unpacked(trace["customdata"]), (VALUES * 10).astype(np.float32))
    assert trace["text"] == [["0.0", "10.0"], ["", "40.0"]]
    assert trace["hovertemplate"] == "layer %{y}, expert %{x}: %{customdata:.1f} %<extra></extra>"


def test_a_large_heat_map_has_no_numbers_in_its_cells() -> None:
    large = HeatMap("a", np.zeros((2, 64)), "expert", "layer", [str(n) for n in range(64)], ["0", "1"], Scale(0, 1, "b"))
    assert "text" not in plot(large).figure["data"][0]


def test_lines_have_their_points_bands_and_the_even_line() -> None:
    drawn = plot(lines()).figure
    low, high, one, other = drawn["data"]
    assert (unpacked(low["y"]).tolist(), unpacked(high["y"]).tolist()) == ([0, 0, 0], [1, 1, 1])
    np.testing.assert_array_equal(unpacked(one["y"]), np.array([1, np.nan, 3], dtype=np.float32))
    assert unpacked(one["x"]).tolist() == [1, 2, 4]
    assert other["line"]["dash"] == "dash"
    assert [shape["y0"] for shape in drawn["layout"]["shapes"]] == [1.0]
    assert drawn["layout"]["showlegend"]


def test_plotly_s_tags_in_texts_are_escaped() -> None:
    for chart in (heat_map(EVIL), lines(EVIL), bars(EVIL)):
        made = plot(chart)
        assert "<b>" not in str(made.figure).replace("<extra></extra>", "")
        assert "&lt;b&gt;" in made.figure["layout"]["title"]["text"]


def test_the_share_over_even_is_held_within_the_colours() -> None:
    scale = ratio_scale("over even")
    colours = ratio_colours(np.array([0.0, 0.0625, 0.25, 0.5, 1.0, np.nan]), 0.125)
    np.testing.assert_array_equal(colours, [scale.low, -1, 1, scale.high, scale.high, np.nan])


def test_a_figure_with_several_views_has_a_menu() -> None:
    one, several = (Figure("a", "A", [View(str(n), [bars()]) for n in range(count)], "What to see.", menu="Layer") for count in (1, 3))
    assert not any(isinstance(part, Choice) for part in page_part(one).parts)
    (menu,) = page_part(several).parts
    assert isinstance(menu, Choice)
    assert [name for name, _ in menu.options] == ["0", "1", "2"]
    assert page_part(several).picture == "a.png"


@pytest.mark.parametrize("chart", [heat_map(EVIL), lines(EVIL), bars(EVIL), heat_map("\ud800 \x00 \u4e2d")], ids=["map", "lines", "bars", "strange"])
def test_a_picture_is_drawn(tmp_path: Path, chart: Any) -> None:
    write_picture(
        Figure("a", EVIL, [View("0", [chart, chart]), View("1", [chart])], "", menu="Layer", legend=[("one", "#0072b2")]), tmp_path / "a.png"
    )
    assert colours_in(tmp_path / "a.png") > 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_shows_some_views_of_many() -> None:
    views = [View(str(n), [bars()]) for n in range(9)]
    assert [view.name for view in chosen(views)] == ["0", "4", "8"]
    assert [view.name for view in chosen(views[:4])] == ["0", "1", "2", "3"]
    assert [view.name for view in chosen([View(str(n), [bars()] * 12) for n in range(9)])] == ["0"]


def test_a_picture_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match=r"a\.png"):
        write_picture(Figure("a", "A", [View("", [bars()])], ""), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_has_the_colours_of_its_bars(tmp_path: Path) -> None:
    write_picture(Figure("a", "A", [View("", [bars()])], ""), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        found = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= found


def test_bars_with_ends_have_error_bars_in_both_forms(tmp_path: Path) -> None:
    plain = Series("one", np.array([1.0, 2.0]), "#0072b2")
    ends = Series("one", np.array([1.0, 2.0]), "#0072b2", low=np.array([0.5, 1.75]), high=np.array([1.25, 2.5]))
    without, with_ends = (Bars("bars", ["a", "b"], [series], "arm", "loss (nats)") for series in (plain, ends))
    assert "error_y" not in plot(without).figure["data"][0]
    bar = plot(with_ends).figure["data"][0]["error_y"]
    assert bar["symmetric"] is False
    np.testing.assert_allclose(unpacked(bar["array"]), [0.25, 0.5])
    np.testing.assert_allclose(unpacked(bar["arrayminus"]), [0.5, 0.25])
    for name, chart in (("without", without), ("with", with_ends)):
        write_picture(Figure(name, "", [View("", [chart])], ""), tmp_path / f"{name}.png")
    pictures = [Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("without", "with")]
    assert pictures[0].tobytes() != pictures[1].tobytes()
