"""A checkpoint becomes the model that was saved, or a sentence says why not."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError, NoCheckpointError
from megatron.config import config_from_dict
from megatron.config.section import ConfigError
from megatron.data.tokenizer import TokenizerError
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.model import choose_attention
from tests.inference.conftest import build_ready, lively_config, write_checkpoint


def load(keys: dict[str, Any], **changes: Any) -> ReadyModel:
    return load_ready_model(config_from_dict({key: value for key, value in {**keys, **changes}.items() if value is not None}))


def test_what_was_saved_is_what_runs(checkpoint: dict[str, Any], ready: ReadyModel) -> None:
    loaded = load(checkpoint)
    assert loaded.iteration == 2
    assert loaded.path == Path(checkpoint["load"]) / "global_step2"
    assert not loaded.gpt.training
    assert not any(parameter.requires_grad for parameter in loaded.gpt.parameters())
    tokens = torch.tensor([[1, 2, 3]])
    choose_attention(config_from_dict({key: value for key, value in checkpoint.items() if value is not None}).model, ready.gpt)  # as loading does
    assert torch.equal(loaded.gpt(tokens).logits_BSV, ready.gpt(tokens).logits_BSV)


def test_the_weights_outlive_the_checkpoint(checkpoint: dict[str, Any], ready: ReadyModel) -> None:
    loaded = load(checkpoint)
    shutil.rmtree(checkpoint["load"])
    assert torch.equal(loaded.gpt.state_dict()["sequential.0.word_embeddings.weight"], ready.gpt.state_dict()["sequential.0.word_embeddings.weight"])


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_stored_logits_are_compared(
    checkpoint: dict[str, Any], ready: ReadyModel, precision: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    caplog.set_level(logging.INFO, "megatron")
    keys = {**checkpoint, "checkpoint_validation_with_forward_pass": True, "precision": precision}
    load(keys)
    assert "holds no logits, so the model cannot be checked" in caplog.text
    file = Path(checkpoint["load"]) / "global_step2/mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=True)
    logits = ready.gpt(torch.arange(16)[None]).logits_BSV
    assert logits is not None
    torch.save({**content, "checkpoint_validation_logits": logits[0]}, file)
    load(keys)
    assert "the loaded model's logits agree with the saved ones" in caplog.text
    torch.save({**content, "checkpoint_validation_logits": logits[0] * 1.2}, file)
    with pytest.raises(CheckpointError, match="does not give the logits of the saved model"):
        load(keys)


def test_save_is_used_without_load(checkpoint: dict[str, Any]) -> None:
    assert load(checkpoint, load=None, save=checkpoint["load"], checkpoint_factor=10).iteration == 2


def test_load_wins_over_save(checkpoint: dict[str, Any]) -> None:
    assert load(checkpoint, save="nowhere", checkpoint_factor=10).iteration == 2


def test_iteration_picks(checkpoint: dict[str, Any], ready: ReadyModel) -> None:
    write_checkpoint(Path(checkpoint["load"]), lively_config(), ready.gpt, iteration=10)
    assert load(checkpoint).iteration == 10
    assert load(checkpoint, iteration=2).iteration == 2
    with pytest.raises(CheckpointError, match=r"no checkpoint of iteration 3\. It holds: 2, 10"):
        load(checkpoint, iteration=3)


@pytest.mark.parametrize("precision", ["bfloat16", "fp16", "fp32"])
def test_precision_is_the_configurations(checkpoint: dict[str, Any], precision: str) -> None:
    dtype = {"bfloat16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert load(checkpoint, precision=precision).dtype == dtype


def test_settings_of_the_training_may_differ(checkpoint: dict[str, Any]) -> None:
    assert load(checkpoint, seq_length=48, hidden_dropout=0.1, moe_losses={}, init_method_std=0.02).context_length == 48


def test_a_checkpoint_of_another_architecture_names_every_key_that_differs(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(checkpoint, hidden_size=64, moe_lore_top_k=1, rotary_pct=0.5)
    path = Path(checkpoint["load"]) / "global_step2"
    assert sorted(caught.value.problems) == [
        f"'hidden_size' = 64: the model in {path} was trained with 32",
        f"'moe_lore_top_k' = 1: the model in {path} was trained with 2",
        f"'rotary_pct' = 0.5: the model in {path} was trained with 1.0",
    ]


def test_without_a_configuration_inside_the_shapes_and_arguments_are_compared(checkpoint: dict[str, Any]) -> None:
    """A checkpoint of GPT-NeoX itself has no resolved.json."""
    (Path(checkpoint["load"]) / "global_step2" / "configs" / "resolved.json").unlink()
    assert load(checkpoint).iteration == 2
    with pytest.raises(CheckpointError, match="num_attention_heads is 4 in the checkpoint and 8 in this run"):
        load(checkpoint, num_attention_heads=8)
    with pytest.raises(CheckpointError, match="is a checkpoint of a model with other weights"):
        load(checkpoint, moe_lore_rank=4)


def test_another_tokenizer_is_refused(checkpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.tokenizer.character.CharLevelTokenizer.vocab_size", 600)
    with pytest.raises(CheckpointError, match=r"has 512 rows, but the tokenizer has 600 entries, padded to 600\. .* Set tokenizer_type and"):
        load(checkpoint)


def test_no_tokenizer(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="needs vocab_file"):
        load(checkpoint, tokenizer_type="HFTokenizer")


def test_no_directory_named(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'load' must be given: the directory with the checkpoint \(without it, `save` is used\)"):
        load(checkpoint, load=None)


def test_no_checkpoint_there(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="does not exist"):
        load(checkpoint, load=str(tmp_path / "nothing"))


def test_threads(checkpoint: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    try:
        load(checkpoint, threads_per_process=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_tied_embeddings(tmp_path: Path) -> None:
    config = lively_config(no_weight_tying=False, load=str(tmp_path))
    write_checkpoint(tmp_path, config, build_ready(config).gpt)
    assert load_ready_model(config).gpt(torch.tensor([[1]])).logits_BSV.shape == (1, 1, 512)


def test_deepspeed_is_not_needed(repository: Path) -> None:
    program = "import sys; import megatron.inference.session, megatron.inference.evaluation; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=repository, check=False).returncode == 0
