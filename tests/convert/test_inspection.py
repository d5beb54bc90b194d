"""tools/ckpts/inspect_checkpoints.py: what it lists, and what differs between two."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron.checkpoint.save_weights import Division
from megatron.convert.to_huggingface import Exported
from tests.convert.models import DECODER, config_of, lively_model, save_model


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    module = tool("tools/ckpts/inspect_checkpoints.py")
    return lambda *words: int(module.main([str(word) for word in words]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_model(tmp_path / "run", config_of(DECODER), lively_model(config_of(DECODER)), division=Division(2))
    return tmp_path / "run"


def test_the_listing(run: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run / "global_step3")
    assert lines[1] == "iteration 3, one file for each process, tensor-parallel 2, without an optimizer"
    assert lines[2] == "3 files, all undamaged (size and SHA-256 checked)"
    row = next(line for line in lines if line.startswith("sequential.2.mlp.linear1.weight"))
    assert row.split() == ["sequential.2.mlp.linear1.weight", "[96,", "32]", "float32", "12,288"]
    assert lines[-1] == "21 weights, 129,920 bytes"


def test_damage_is_named(run: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "global_step3" / "mp_rank_01_model_states.pt", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    main(run / "global_step3")
    assert "mp_rank_01_model_states.pt is damaged: expected SHA-256" in capsys.readouterr().out


def test_two_of_them(run: Path, tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(DECODER)
    gpt = lively_model(config)
    save_model(tmp_path / "same", config, gpt)
    assert main(run, tmp_path / "same") == 0
    assert capsys.readouterr().out == "The weights are the same, bit for bit.\n"
    gpt.state_dict()["sequential.2.input_layernorm.scale"][3] += 0.5
    save_model(tmp_path / "other", config, gpt)
    assert main(run, tmp_path / "other") == 1
    assert capsys.readouterr().out == "sequential.2.input_layernorm.scale: 1 of 32 numbers differ, by at most 0.5\n"
    smaller = config_of({**DECODER, "num_layers": 2, "ffn_hidden_size": 24})
    save_model(tmp_path / "smaller", smaller, lively_model(smaller))
    assert main(run, tmp_path / "smaller") == 1
    printed = capsys.readouterr().out
    assert "sequential.2.mlp.linear2.weight: shape [32, 48] and [32, 24]\n" in printed
    assert f"sequential.4.attention.dense.weight: only in {run / 'global_step3'}\n" in printed


def test_models_of_hugging_face_s(
    run: Path, tmp_path: Path, main: Callable[..., int], export: Callable[..., Exported], capsys: pytest.CaptureFixture[str]
) -> None:
    export(run, tmp_path / "hf", save_tokenizer=False, check=False)
    export(run, tmp_path / "half", save_tokenizer=False, check=False, precision="bf16")
    assert main(tmp_path / "hf") == 0
    assert "a Hugging Face model in 1 files of weights\n" in capsys.readouterr().out
    assert main(tmp_path / "hf", tmp_path / "half") == 1
    assert "model.norm.weight: float32 and bfloat16, " in capsys.readouterr().out
    assert main(tmp_path / "nowhere") == 1
    assert "nowhere is not a directory" in capsys.readouterr().err
