"""A file that a run is writing: half lines, restarts, replacements."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron.analysis.dashboard.follow import MetricsFile, Replaced
from megatron.analysis.dashboard.run import Run, name_runs
from megatron.monitor.jsonl import JsonlSink


def lines(steps: range, **more: float) -> str:
    return "".join(json.dumps({"iteration": step, "train/lm_loss": float(step), **more}) + "\n" for step in steps)


def steps_of(file: MetricsFile) -> list[int]:
    return [record["iteration"] for record in file.new_records()]


def test_only_new_lines_are_read_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert steps_of(file) == [], "there is no file yet"
    path.write_text(lines(range(1, 4)) + '{"iteration": 4, "tra')
    assert steps_of(file) == [1, 2, 3]
    assert steps_of(file) == []
    with path.open("a") as end:
        end.write('in/lm_loss": 4.0}\n' + lines(range(5, 7)))
    assert steps_of(file) == [4, 5, 6]


@pytest.mark.parametrize(
    "end",
    [
        b'{"iteration": 2, "train/lm',
        b"not json\n",
        b"[1, 2]\n",
        b'{"iteration": "x"}\n',
        b'{"iteration": true}\n',
        b"\x00\xff\n",
        b"[" * 9999 + b"\n",
    ],
)
def test_a_line_that_is_no_record_is_left_out(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(range(1, 2)).encode() + end)
    file = MetricsFile(path)
    assert steps_of(file) == [1]
    with path.open("a") as more:
        more.write("\n" + lines(range(3, 4)))
    assert steps_of(file) == [3]


@pytest.mark.parametrize("how", ["another file", "shorter", "same length", "longer"])
def test_a_file_that_is_another_one_is_noticed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(1, 4)))
    file = MetricsFile(path)
    assert steps_of(file) == [1, 2, 3]
    if how == "another file":
        (tmp_path / "new").write_text(lines(range(1, 4)))
        os.replace(tmp_path / "new", path)
    else:
        path.write_text(lines({"shorter": range(1, 3), "same length": range(2, 5), "longer": range(2, 9)}[how]))
    with pytest.raises(Replaced):
        steps_of(file)
    assert steps_of(file)[0] in (1, 2)


def test_a_file_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(1, 4)))
    run = Run(tmp_path, "a")
    run.refresh()
    path.unlink()
    run.refresh()
    assert (run.last_step, len(run.column("train/lm_loss")[0])) == (-1, 0)
    path.write_text(lines(range(1, 6)))
    run.refresh()
    assert run.column("train/lm_loss")[0].tolist() == [1, 2, 3, 4, 5]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """The real writer of metrics.jsonl replaces the file when it resumes."""
    run = Run(tmp_path, "a")
    for first, last, loss in ((1, 7, 1.0), (5, 9, 2.0)):
        sink = JsonlSink(tmp_path / "metrics.jsonl", resume_from=first - 1)
        for step in range(first, last):
            sink.write(step, {"train/lm_loss": loss})
            run.refresh()
        sink.close()
    steps, losses = run.column("train/lm_loss")
    assert steps.tolist() == list(range(1, 9))
    assert losses.tolist() == [1.0] * 4 + [2.0] * 4


def test_steps_that_go_back_in_one_file_replace_the_later_ones(tmp_path: Path) -> None:
    alert = {"kind": "loss_spike", "step": 5, "seen": "a", "try": "b"}
    text = lines(range(1, 6)) + json.dumps({"iteration": 5, "alert": alert}) + "\n" + lines(range(3, 5))
    (tmp_path / "metrics.jsonl").write_text(text)
    run = Run(tmp_path, "a")
    run.refresh()
    assert run.column("train/lm_loss")[0].tolist() == [1, 2, 3, 4]
    assert run.alerts == []


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    run = Run(tmp_path, "a")
    run.refresh()
    assert run.trouble == f"{tmp_path}/metrics.jsonl cannot be read: Is a directory"
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "metrics.jsonl").write_text(lines(range(1, 2)))
    run.refresh()
    assert (run.trouble, run.last_step) == (None, 1)


def test_odd_values_are_left_out_or_gaps(tmp_path: Path) -> None:
    records = [
        {"iteration": 1, "train/lm_loss": None, "a": "text", "b": True, "c": {"d": 1}, "gradient_norms/w": 1.0, "e": 10**400},
        {"iteration": 2, "moe/x_by_layer": [None, "a"], "moe/expert_load": [[1], "a"], "alert": {"kind": 3}},
        {"iteration": 3, "moe/x_by_layer": [], "moe/expert_load": [], "alert": "fire"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = Run(tmp_path, "a")
    run.refresh()
    assert set(run.columns) == {"train/lm_loss", "e"}
    assert run.alerts == []
    assert run.table("moe/expert_load") == []
    assert run.matrix("moe/x_by_layer")[0] == [3]


def test_snapshots_are_thinned_out_and_the_newest_is_kept(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 1001):
            file.write(json.dumps({"iteration": step, "moe/expert_load": [[step, 1]], "moe/x_by_layer": [1.0, step]}) + "\n")
    run = Run(tmp_path, "a")
    run.refresh()
    assert 50 < len(run.snapshots) <= 200
    assert [row.tolist() for row in run.table("moe/expert_load")] == [[1000, 1]]
    assert run.column("moe/x/max")[1].tolist() == list(range(1, 1001))


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert name_runs([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert name_runs([Path("one/run"), Path("two/run/metrics.jsonl")]) == ["one/run", "two/run"]
