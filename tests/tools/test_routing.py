"""tools/analysis/routing.py: a checkpoint, a trace of it, two checkpoints side by side, and every message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.analysis.routing.files import read_findings
from megatron.model.gpt import build_model
from megatron.testing.tiny import TINY_STRUCTMOE
from tests.inference.conftest import lively_config, write_checkpoint

TEXT = "The routing of a text. It goes on and on, and every token has its experts.\n" * 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints of one run."""
    for iteration, seed in ((2, 3), (4, 5)):
        config = lively_config(TINY_STRUCTMOE, moe_num_experts=8)
        write_checkpoint(tmp_path / "run", config, build_model(config.model, config.moe, 512, seed=seed), iteration)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "run"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PNGs of a report take matplotlib 10 s; tests that look at numbers leave them out."""
    monkeypatch.setattr("megatron.analysis.routing.report.report.write_picture", lambda *_: None)


@pytest.fixture
def main(tool: Callable[[str], Any]) -> Callable[..., int]:
    """The command with texts and a report folder."""

    def work(*argv: object) -> int:
        status: int = tool("tools/analysis/routing.py").main([str(argument) for argument in argv])
        return status

    return work


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_and_the_trace_of_it_give_the_same(
    run: Path, tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    text = ("--text", f"mine={tmp_path / 'text.txt'}", "math", "--tokens", 300)
    assert main(run, *text, "--out", tmp_path / "a", "--trace", tmp_path / "trace.npz") == 0
    shown = capsys.readouterr()
    assert "run, step 4: 2 layers, 8 experts, 2 for each token" in shown.out
    assert "4 LoREs in each expert, 2 for each token" in shown.out
    assert "run, step 4: 600 tokens in" in shown.err
    assert main(tmp_path / "trace.npz", "--out", tmp_path / "b") == 0
    one, other = (read_findings(tmp_path / name / "routing.json").models[0] for name in ("a", "b"))
    assert one.groups == other.groups == ["mine", "math", "all"]
    assert (one.kind, other.kind, one.iteration) == ("checkpoint", "trace", 4)
    for part in ("load", "repeats", "locality", "specialisation", "lores"):
        first, second = getattr(one, part), getattr(other, part)
        for name, value in vars(first).items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(value, getattr(second, name), equal_nan=True), (part, name)
    assert one.samples[0].pieces[:11] == list("The routing")
    assert one.samples[0].starts == [0, 32, 64, 96, 128, 160, 192, 224]


@pytest.mark.usefixtures("no_pictures")
def test_two_checkpoints_side_by_side(run: Path, tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run / "global_step4", run / "global_step2", run, "--text", "math", "--tokens", 200, "--out", tmp_path / "out") == 0
    assert "router saturation" in capsys.readouterr().out
    found = read_findings(tmp_path / "out" / "routing.json")
    assert [model.name for model in found.models] == ["run, step 4", "run, step 2", "run, step 4 (2)"]
    assert found.saturation is not None
    assert found.saturation.names == ["run, step 2", "run, step 4", "run, step 4 (2)"]
    assert found.saturation.share_SL[1:].tolist() == [[1, 1], [1, 1]]
    assert 0 < found.saturation.share_SL[0].mean() < 1


@pytest.mark.slow
def test_where_the_report_goes_without_an_option(run: Path, main: Callable[..., int]) -> None:
    assert main(run, "--text", "math", "--tokens", 50, "--context", 10) == 0
    content = json.loads((run / "routing_report" / "routing.json").read_text())
    assert content["models"][0]["samples"][0]["starts"] == [0, 10, 20, 30, 40]


def test_traces_of_other_programs(tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "vllm.npy", np.random.default_rng(1).random((90, 3, 8)).argsort(-1)[..., :2])
    assert main(tmp_path / "vllm.npy", "--num-experts", 8, "--out", tmp_path / "out") == 0
    assert "the trace has no weights. The first choice is the first expert that it names" in capsys.readouterr().out.replace("\n", " ")
    found = read_findings(tmp_path / "out" / "routing.json")
    assert found.models[0].specialisation.tokens == []
    assert found.models[0].tokens_G.tolist() == [90]
    assert len(list((tmp_path / "out").glob("*.png"))) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "There is no missing. Give a checkpoint (or the directory of a run), a Hugging Face directory, or routing traces."),
        (["{run}", "--text", "prose=missing.txt"], "--text prose=missing.txt: there is no file missing.txt."),
        (["{run}", "{run}", "--trace", "x.npz"], "--trace writes the routing of one model, and 2 paths were given."),
        (["{run}/global_step2/configs"], "configs"),
        (["{run}/../text.txt"], "text.txt is no routing trace of this program, vLLM"),
    ],
)
def test_mistakes(arguments: list[str], message: str, run: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*[argument.format(run=run) for argument in arguments]) != 0
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_numbers_that_are_none(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "-3", "many"):
        with pytest.raises(SystemExit):
            main("x", "--tokens", text)
        assert "--tokens" in capsys.readouterr().err
