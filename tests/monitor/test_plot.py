"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.monitor.jsonl import JsonlSink
from megatron.monitor.plot import NothingToDraw, plot_metrics


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


def test_nothing_to_draw(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "metrics.jsonl", resume_from=0).close()
    with pytest.raises(NothingToDraw, match="no line has train/lm_loss"):
        plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "training.png", title="run")
