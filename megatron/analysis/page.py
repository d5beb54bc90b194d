"""Pages with pictures that need no network: a title and sections become one HTML file.

The file carries everything: Plotly's program once, the data, our style. Its content security policy forbids every request. Each text is escaped.
Plotly draws a picture when it is first seen, so that a page with hundreds of them opens at once.

    page = page_html("Routing", [Section("Load", [Text("What to see."), Plot(figure, label="Share of each expert")])])
    write_page(Path("routing.html"), page)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

FRAME = Path(__file__).parent / "frame"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Series in this order. The first six are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind people can tell apart."""


@dataclass(frozen=True)
class Text:
    """A paragraph. It is escaped."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Notice:
    """A paragraph that must be seen. `level` is "good", "warning" or "bad"."""

    text: str
    level: str = "warning"
    kind: ClassVar[str] = "notice"


@dataclass(frozen=True)
class Plot:
    """An interactive picture: a figure of Plotly, or its dictionary with `data` and `layout`. Colours of text, grid and ground are the page's.

    Plotly reads tags in titles, labels and hover texts: escape with `plotly_text` what comes from a model or a file."""

    figure: Any
    label: str
    """What the picture shows, in one sentence, for screen readers."""
    height: int = 360
    """In CSS pixels."""
    kind: ClassVar[str] = "plot"

    @property
    def data(self) -> Any:
        """The figure as JSON that may stand inside a script element."""
        from markupsafe import Markup

        return Markup(script_json(self.figure))


@dataclass(frozen=True)
class Legend:
    """The names and colours of several plots' series, once above them."""

    entries: Sequence[tuple[str, str]]
    """Name and CSS colour."""
    kind: ClassVar[str] = "legend"


@dataclass(frozen=True)
class DataTable:
    """A table. Numbers are given as text that is ready to read; every column but the first is aligned to the right if `numbers`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    label: str = ""
    """The table's caption. Empty: the text around it says what it is."""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Grid:
    """Parts side by side, as many as fit: each is at least `smallest` CSS pixels wide."""

    parts: Sequence[Part]
    smallest: int = 340
    kind: ClassVar[str] = "grid"


@dataclass(frozen=True)
class Choice:
    """A menu that shows one of several lists of parts, the first one to begin with. Choices of one `group` change together."""

    label: str
    options: Sequence[tuple[str, Sequence[Part]]]
    group: str = ""
    """Empty: this choice alone."""
    kind: ClassVar[str] = "choice"


@dataclass(frozen=True)
class Captioned:
    """A picture with its title, what to see in it, and whose idea it is."""

    title: str
    parts: Sequence[Part]
    caption: str = ""
    source: str = ""
    """The paper, figure and number. Empty: the picture is this project's."""
    picture: str = ""
    """A file beside the page that holds the same picture. Empty: there is none."""
    kind: ClassVar[str] = "captioned"


@dataclass(frozen=True)
class Tokens:
    """A text whose tokens have the colours of their experts, with a menu of layers. Under the pointer a token shows the experts of every layer.

    `experts[l][t]` are the experts of token t in layer l, the strongest first. `weights` has the same form. `lores[l][t][k]` are the LoREs of its
    k-th expert."""

    tokens: Sequence[str]
    layers: Sequence[int]
    experts: Sequence[Sequence[Sequence[int]]]
    experts_of_layer: Sequence[int]
    weights: Sequence[Sequence[Sequence[float]]] | None = None
    """None: the trace holds no weights."""
    lores: Sequence[Sequence[Sequence[Sequence[int]]]] | None = None
    """None: the experts have no LoREs."""
    group: str = ""
    """Texts of one group show the same layer. Empty: this text alone."""
    kind: ClassVar[str] = "tokens"

    @property
    def data(self) -> Any:
        """What the page's program reads, as JSON that may stand inside a script element."""
        from markupsafe import Markup

        names = ("tokens", "layers", "experts", "experts_of_layer", "weights", "lores")
        return Markup(script_json({name: getattr(self, name) for name in names}))


Part = Text | Notice | Plot | Legend | DataTable | Grid | Choice | Captioned | Tokens


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its table of contents."""

    title: str
    parts: Sequence[Part] = field(default_factory=tuple)


def page_html(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    facts: Mapping[str, str] | None = None,
    refresh_seconds: float | None = None,
    live: bool = False,
) -> str:
    """The whole page. `facts` (None: none) stand below the title as name and value. `refresh_seconds` (None: never) loads the page anew from its file
    while the reader lets it; menus keep what was chosen. `live`: a server answers the page's own address with `?parts`, which is `parts_html`, and
    the page takes its new content from there, so that zoom and place stay."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return _filled(
        title=title,
        subtitle=subtitle,
        facts=dict(facts or {}),
        sections=sections,
        refresh_seconds=refresh_seconds,
        live=live,
        style=Markup((FRAME / "page.css").read_text(encoding="utf-8")),
        program=Markup((FRAME / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()) if live or _has_plots(sections) else "",
        template=Markup(script_json(plot_template())),
    )


def parts_html(sections: Sequence[Section]) -> str:
    """The page without Plotly, style and program: what a page that is `live` asks the server for."""
    return _filled(sections=sections)


def _filled(**values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(FRAME), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return environment.get_template("page.html").render(written=written, **values)


def write_page(path: Path, page: str) -> None:
    """Writes the page completely or not at all: who reloads it never sees half of it. Characters that UTF-8 does not have become "?"."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    try:
        unfinished.write_text(page, encoding="utf-8", errors="replace")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def plotly_text(text: str) -> str:
    """The text for a title, label or hover text of Plotly, which reads tags and entities there."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no "<" can end it. Arrays of NumPy in a figure become Plotly's base64 form; NaN becomes null."""
    from plotly.io import to_json
    from plotly.io.json import to_json_plotly

    is_figure = hasattr(value, "to_plotly_json")
    text: str = to_json(value, validate=False, engine="json") if is_figure else to_json_plotly(value, engine="json")
    return json.dumps(_without_template(json.loads(text)), ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def _without_template(figure: Any) -> Any:
    """Each figure would carry a copy of Plotly's template; the page has its own, once."""
    if isinstance(figure, dict) and isinstance(figure.get("layout"), dict):
        figure["layout"].pop("template", None)
    return figure


def plot_template() -> dict[str, Any]:
    """What all plots of a page share. Colours of text and lines are set by the page's style, so that they follow light and dark."""
    axis = {"automargin": True, "zeroline": False, "ticks": "outside", "ticklen": 4, "title": {"standoff": 8}}
    layout = {
        "colorway": list(COLOURS),
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#63605a"},
        "title": {"font": {"size": 14}, "x": 0.01, "xanchor": "left"},
        "margin": {"l": 56, "r": 16, "t": 36, "b": 48},
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"namelength": -1},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
    }
    return {"layout": layout}


def _has_plots(parts: Sequence[Any]) -> bool:
    """Whether a plot is among the parts, however deep."""
    for part in parts:
        if isinstance(part, Plot):
            return True
        inner = [p for _, group in part.options for p in group] if isinstance(part, Choice) else getattr(part, "parts", ())
        if _has_plots(inner):
            return True
    return False
