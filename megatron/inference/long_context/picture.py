"""Pictures of what was measured by context length, beside the results file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config import disk
from megatron.inference.errors import InferenceError


def draw_context(results: Path, content: Mapping[str, Any]) -> list[Path]:
    """Draws `context` and `passkey` of the results, each as a PNG beside the file, and returns the paths. Raises InferenceError."""
    written = []
    for name, draw in (("context", _draw_losses), ("passkey", _draw_passkey)):
        if name not in content:
            continue
        path = results.with_name(f"{results.stem}_{name}.png")
        try:
            _save(draw, content[name], path)
        except OSError as error:
            raise InferenceError(f"{path} cannot be written: {disk.explained(error, path)}.") from error
        written.append(path)
    return written


def _save(draw: Any, content: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, content)
    figure.savefig(path, dpi=130)


def _draw_losses(figure: Any, content: Mapping[str, list[Mapping[str, Any]]]) -> None:
    axes = figure.add_subplot()
    for name, rows in content.items():
        axes.errorbar(
            [row["last"] for row in rows], [row["loss"] for row in rows], [row["standard_error"] or 0 for row in rows], marker="o", label=name
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({row["last"] for rows in content.values() for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context (up to)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss by context length; bars: standard error")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_passkey(figure: Any, content: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    lengths = list(content["accuracy"])
    shares = [[100 * share for share in content["accuracy"][length]] for length in lengths]
    picture = axes.imshow([list(column) for column in zip(*shares, strict=True)], vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
    axes.set_yticks(range(len(content["depth_percent"])), [f"{depth:.0f} %" for depth in content["depth_percent"]])
    for column, values in enumerate(shares):
        for row, value in enumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center")
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the number in the text")
    axes.set_title(f"Passkey retrieval: right answers in %, {content['trials']} texts each")
    figure.colorbar(picture, ax=axes)
