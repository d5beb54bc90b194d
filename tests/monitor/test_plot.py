"""The picture of a run."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron.monitor.jsonl import JsonlSink
from megatron.monitor.plot import STEPS_PER_REACH, NothingToDraw, means_around, plot_metrics


@pytest.mark.parametrize("with_experts", [False, True])
def test_draws_a_png(tmp_path: Path, with_experts: bool) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_from=0)
    for step in range(1, 30):
        table = {"moe/expert_load": [[step, 3], [2, 2]]} if with_experts and step % 10 == 0 else {}
        sink.write(step, {"train/lm_loss": 5.0 / step if step != 7 else float("nan"), **table})
    sink.write(29, {"validation/lm_loss": 1.0})
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "deep/training.png", title="run")
    assert (tmp_path / "deep/training.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["training.png"]


@pytest.mark.parametrize("length", [1, 3, 37, 79, 80, 1100])
def test_the_bold_line_is_the_losses(length: int) -> None:
    """It starts where they do, ends at the mean of the last ones, and is they themselves in a short run."""
    losses = [10.0 - 9.0 * step / length + (-1) ** step for step in range(length)]
    means = means_around(losses, length // STEPS_PER_REACH)
    last = losses[-(length // STEPS_PER_REACH) - 1 :]
    assert (means[0], means[-1]) == (pytest.approx(losses[0]), pytest.approx(sum(last) / len(last)))
    assert length >= STEPS_PER_REACH or means == pytest.approx(losses)
    assert all(abs(mean - (10.0 - 9.0 * step / length)) < 0.5 for step, mean in enumerate(means) if 13 < step < 1086 and length == 1100)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 10, 37, 1100])
def test_ticks_are_whole_steps_and_the_panel_is_full(length: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), Path(path).write_bytes(b"")))
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_from=0)
    for step in range(1, length + 1):
        sink.write(step, {"train/lm_loss": 5.0 / step, **({"moe/expert_load": [[step, 3]]} if step in (length // 2, length) else {})})
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "training.png", title="run")
    for axis in figures[0].axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)
    low, high = figures[0].axes[0].get_xlim()
    assert (1 - low, high - length) == (pytest.approx(0.02 * (length - 1) or 0.5), pytest.approx(0.02 * (length - 1) or 0.5))
    assert figures[0].axes[1].lines[0].get_marker() == "o", "one or two points are no line that could be seen"


@pytest.mark.parametrize("title", ["runs/\u4e2d\u6587", "runs/\u0939\u093f \U0001f680", "runs/a$b", "runs/$x_$y$"])
def test_any_name_is_a_title(title: str, tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_from=0)
    sink.write(1, {"train/lm_loss": 5.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "training.png", title=title)
    assert (tmp_path / "training.png").stat().st_size


def test_nothing_to_draw(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "metrics.jsonl", resume_from=0).close()
    with pytest.raises(NothingToDraw, match="no line has train/lm_loss"):
        plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "training.png", title="run")
