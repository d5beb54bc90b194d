"""The planner's command, as a user starts it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = "configs/quickstart.yml"


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/analysis/plan.py", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)


def test_a_plan_with_its_json(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    short = ("-o", "num_layers=2", "--vocab", "512", "--layouts", "0")
    done = run(repository, QUICKSTART, "--gpus", "8", "--gpu", "a100-80gb", *short, "--json", str(output))
    assert done.returncode == 0, done.stderr
    assert "tokens/s on each GPU" in done.stdout
    assert "allreduce of data (8)" in done.stdout
    values = json.loads(output.read_text(encoding="utf-8"))
    assert values["gpus"] == 8
    assert values["machine"]["name"] == "a100-80gb"
    memory = values["stages"][0]["memory"]
    assert memory["optimizer"] > 0
    assert sum(memory.values()) == 2 * memory["total"]
    assert sum(values["seconds_by_part"].values()) == pytest.approx(values["step_seconds"])


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ((QUICKSTART, "--gpus", "8", "--gpu", "b300"), 2, "--gpu b300: there is no such machine; known: a100-80gb, h100-80gb, h200-141gb"),
        ((QUICKSTART, "--gpus", "99999999", "--gpu", "h100-80gb"), 2, "must be a whole number, at most 1,048,576, not '99999999'"),
        ((QUICKSTART, "--gpus", "8", "--gpu", "h100-80gb", "--json", "docs"), 2, "--json docs: this is a folder; give the name of a file"),
        ((QUICKSTART, "--gpus", "8"), 2, "give a CONFIG, --gpus and --gpu"),
        ((QUICKSTART, "--gpus", "8", "--gpu", "h100-80gb", "-o", "pipe_parallel_size=16"), 2, "'pipe_parallel_size' = 16"),
    ],
)
def test_mistakes_are_sentences(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int, sentence: str
) -> None:
    monkeypatch.chdir(repository)
    main = runpy.run_path("tools/analysis/plan.py")["main"]
    try:
        ended = main(list(arguments))
    except SystemExit as stop:  # argparse
        ended = stop.code
    said = capsys.readouterr().err
    assert ended == status
    assert sentence in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_measured_runs_are_predicted(repository: Path) -> None:
    """At least three quarters of all rows within 25 %: the promise of docs/planning.md."""
    done = run(repository, "--calibration")
    assert done.returncode == 0, done.stderr
    good, _, rest = done.stdout.strip().splitlines()[-1].partition(" of ")
    assert int(good) / int(rest.split()[0]) >= 0.75
