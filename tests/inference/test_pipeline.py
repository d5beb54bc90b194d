"""generate.py and eval.py on the stages of a pipeline: the texts and scores of one process."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron.config.launcher import LauncherConfig
from megatron.config.parallel import ParallelConfig
from megatron.data.progress import build_reporter
from megatron.inference.evaluation import evaluate
from megatron.inference.processes import take_part
from megatron.inference.session import generate
from megatron.testing.distributed import DistributedError, run_distributed
from megatron.testing.tiny import TINY_STRUCTMOE, tiny_config
from tests.inference.conftest import LIVELY, build_ready, lively_config, write_checkpoint

MODEL = {"num_layers": 3, "pos_emb": "learned", "no_weight_tying": False}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Keys with which three layers write samples and score a text."""
    config = lively_config(**MODEL)
    write_checkpoint(tmp_path / "run", config, build_ready(config).gpt)
    (tmp_path / "prompts.txt").write_text("One\nTwo and three\n")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    files = {"sample_input_file": str(tmp_path / "prompts.txt"), "eval_text_files": [str(tmp_path / "text.txt")]}
    chosen = {"maximum_tokens": 6, "temperature": 0.7, "num_samples": 2}
    return {**TINY_STRUCTMOE, **LIVELY, **MODEL, **files, **chosen, "load": str(tmp_path / "run")}


def write_and_score(values: Mapping[str, Any], folder: Path) -> str | None:
    """Samples and scores in `folder`. Gives what this process showed; None if it takes no part."""
    config = tiny_config(values, sample_output_file=str(folder / "samples.jsonl"), eval_results_prefix=str(folder / "scores"))
    if not take_part(config.parallel, config.launcher):
        return None
    console = Console(file=io.StringIO(), width=200)
    generate(config, console, input, terminal=False)
    evaluate(config, console, build_reporter(quiet=True))
    shown = console.file
    assert isinstance(shown, io.StringIO)
    return shown.getvalue()


def written(folder: Path) -> tuple[list[str], Any]:
    (scores,) = folder.glob("scores_*.json")
    samples = [json.loads(line)["text"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    return samples, json.loads(scores.read_text())["results"]


@pytest.mark.parametrize(("stages", "method"), [(2, "type:transformer|mlp"), (3, "uniform")])
def test_stages_write_and_score_what_one_process_does(values: dict[str, Any], tmp_path: Path, stages: int, method: str) -> None:
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    write_and_score(values, tmp_path / "one")
    keys = {"pipe_parallel_size": stages, "pipe_partition_method": method}
    first, *others = run_distributed(write_and_score, stages, {**values, **keys}, tmp_path / "several", backend=None)
    assert written(tmp_path / "several") == written(tmp_path / "one")
    assert len(written(tmp_path / "several")[0]) == 4
    assert "[4/4]" in first
    assert others == [""] * (stages - 1), "one of them speaks"


def test_a_dialogue_needs_one_process(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DistributedError, match="text_gen_type: interactive needs one process, and 2 run this model; add -o pipe_parallel_size=0"):
        run_distributed(write_and_score, 2, {**values, "pipe_parallel_size": 2, "text_gen_type": "interactive"}, tmp_path, backend=None)


@pytest.mark.parametrize(("rank", "works"), [("0", True), ("1", False)])
def test_other_layouts_leave_the_work_to_the_first_process(rank: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "4"}.items():
        monkeypatch.setitem(os.environ, name, value)
    parallel = ParallelConfig(pipe_parallel_size=2, model_parallel_size=2)
    assert take_part(parallel, LauncherConfig()) is works
