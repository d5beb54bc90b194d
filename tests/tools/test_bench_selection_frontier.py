"""tools/bench/selection_frontier.py: it trains and measures a run, and its picture shows the runs of its file."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron.testing.tiny import TINY_STRUCTMOE
from tests.training.runs import run_values


@pytest.fixture
def tool(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_selection_frontier", repository / "tools/bench/selection_frontier.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_run_is_trained_and_measured(tool: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.yml"
    base.write_text(json.dumps(run_values(corpus, None, train_iters=3, eval_iters=1, checkpoint_factor=3, plot_file=str(tmp_path / "run.png"))))
    monkeypatch.setattr(tool, "BASE", base)
    settings = ["moe_losses={neighbour_selection: 0.5}", "seed=7"]
    monkeypatch.setattr(sys, "argv", ["selection_frontier.py", str(tmp_path / "runs"), "--micro-batches", "2", "--new", "mine", *settings])
    tool.main()
    (line,) = map(json.loads, (tmp_path / "runs/frontier.jsonl").read_text().splitlines())
    assert (line["run"], line["settings"], line["steps"]) == ("mine", settings, 3)
    assert 0 < line["loss"] < 2 * math.log(512)
    assert 0 < line["expert_replacement"] <= 100
    assert len(line["by_layer"]) == TINY_STRUCTMOE["num_layers"]


def test_the_file_of_results_has_a_baseline_for_every_run_and_its_picture_is_drawn(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tool.known_runs()
    names = [run["run"] for run in runs]
    assert {"baseline", "local_experts", "mixtral"} < set(names)
    assert len(set(names)) == len(names)
    assert {run["against"] for run in runs if "against" in run} <= set(names)
    monkeypatch.setattr(sys, "argv", ["selection_frontier.py", "--plot", str(tmp_path / "frontier.png")])
    tool.main()
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
