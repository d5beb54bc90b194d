"""Runs that save in GPT-NeoX's layouts and go on from its checkpoints; what is asked for and not there is said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.weights import load_model_weights
from megatron.config.section import ConfigError
from megatron.inference.model import load_ready_model
from megatron.testing.tiny import TINY_DENSE, tiny_config
from tests.checkpoint.upstream import cut_for_rank, head, write_layers, write_sequential
from tests.training.runs import run_values, train_losses

KEPT = ("lr_scheduler", "random_rng_state", "np_rng_state", "torch_rng_state")
LAYERS = [f"layer_{layer:02d}-model_00-model_states.pt" for layer in (0, 2, 3, 5, 6)]


def dense(corpus: Path, save: Path | None, **overrides: Any) -> dict[str, Any]:
    """A dense model with dropout, so that a resumed run needs its random states."""
    values = {key: value for key, value in run_values(corpus, save).items() if key in TINY_DENSE or not key.startswith(("moe_", "intermediate"))}
    return {**values, "hidden_dropout": 0.1, "eval_iters": 0, **overrides}


def rewritten(directory: Path, path: Path, *, layers: bool = False, optimizer: bool = True) -> Path:
    """The weights, optimizer and random states of one of our checkpoints (ZeRO 0) as GPT-NeoX writes them, its fused Adam's state included."""
    stored = torch.load(path / "mp_rank_00_model_states.pt", weights_only=True)
    adam = stored["optimizer"]
    steps = {int(entry.pop("step")) for entry in adam["state"].values()}
    groups = [
        {"lr": group["lr"], "weight_decay": group["weight_decay"], "params": group["params"], "step": max(steps)} for group in adam["param_groups"]
    ]
    kept = {key: stored[key] for key in KEPT}
    content = head(stored["iteration"], stored["args"], **kept, optimizer={"state": adam["state"], "param_groups": groups} if optimizer else {})
    return (write_layers if layers else write_sequential)(directory, [stored["module"]], content)


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run of 8 steps with checkpoints at 4 and 8, and its losses."""
    save = tmp_path_factory.mktemp("straight") / "run"
    return save, train_losses(dense(corpus, save, checkpoint_validation_with_forward_pass=True))


def test_layer_files_hold_the_same_run(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    """Written with pipe_parallel_size 1, gone on from with 0, and the other way round: bit for bit."""
    for first, second in ((1, 0), (0, 1)):
        halves = dense(corpus, tmp_path / f"{first}", resume_if_exists=True)
        assert train_losses({**halves, "pipe_parallel_size": first, "exit_interval": 4}) == straight[1][:4]
        assert train_losses({**halves, "pipe_parallel_size": second}) == straight[1]
    path = tmp_path / "1/global_step4"
    assert sorted(file.name for file in path.glob("layer_*")) == LAYERS
    assert torch.load(path / "mp_rank_00_model_states.pt", weights_only=True)["module"] is None
    assert set(torch.load(path / LAYERS[1], weights_only=True)) == {
        f"{module}.{kind}"
        for module in ("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2")
        for kind in ("weight", "bias")
    }


def test_layer_files_under_zero_hold_no_more_than_their_layer(corpus: Path, tmp_path: Path) -> None:
    values = dense(corpus, tmp_path / "a", zero_optimization={"stage": 1}, pipe_parallel_size=1)
    expected = train_losses(values)
    path = tmp_path / "a/global_step4"
    bytes_of_weights = sum(4 * tensor.numel() for tensor in load_model_weights(path).state_dict.values())
    assert sum(file.stat().st_size for file in path.glob("layer_*")) < 1.2 * bytes_of_weights
    halves = {**values, "save": str(tmp_path / "b"), "load": str(tmp_path / "a"), "iteration": 4}
    assert train_losses(halves) == expected[4:]


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_derived_is_written_and_not_needed(corpus: Path, tmp_path: Path, stage: int) -> None:
    values = dense(corpus, tmp_path / "a", pos_emb="alibi", precision="bfloat16", pipe_parallel_size=1, zero_optimization={"stage": stage})
    expected = train_losses(values)
    if not stage:
        assert torch.load(tmp_path / "a/global_step4" / LAYERS[1], weights_only=True)["attention.alibi_embed.slopes"].dtype == torch.float32
    assert train_losses({**values, "save": str(tmp_path / "b"), "load": str(tmp_path / "a"), "iteration": 4}) == expected[4:]


def test_zero_3_keeps_its_own_files(corpus: Path, tmp_path: Path) -> None:
    values = dense(corpus, tmp_path / "a", zero_optimization={"stage": 3}, pipe_parallel_size=1)
    expected = train_losses(values)
    assert not list((tmp_path / "a/global_step4").glob("layer_*"))
    assert train_losses({**values, "save": str(tmp_path / "b"), "load": str(tmp_path / "a"), "iteration": 4}) == expected[4:]


@pytest.mark.parametrize("layers", [False, True])
def test_a_run_of_upstream_goes_on_with_its_optimizer(
    corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]], layers: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    save, expected = straight
    rewritten(tmp_path / "theirs", save / "global_step4", layers=layers)
    losses = train_losses(dense(corpus, tmp_path / "ours", load=str(tmp_path / "theirs")))
    assert losses == expected[4:]
    output = capsys.readouterr().out
    assert "Written by another program, without checksums: its files cannot be checked for damage." in output
    assert "step 4 of 8" in output


def test_a_converted_checkpoint_needs_finetune(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    rewritten(tmp_path / "theirs", straight[0] / "global_step8", optimizer=False)
    values = dense(corpus, tmp_path / "ours", load=str(tmp_path / "theirs"), hidden_dropout=0.0)
    with pytest.raises(CheckpointError, match=r"holds no optimizer state .*add `-o no_load_optim=true`"):
        train_losses(values)
    tuned = train_losses({**values, "finetune": True})
    assert len(tuned) == 8
    assert tuned[0] < straight[1][0]


@pytest.mark.parametrize("own", [True, False])
def test_training_further_on_longer_texts(
    corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]], own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    load = straight[0] if own else rewritten(tmp_path / "theirs", straight[0] / "global_step8").parent
    further = {"load": str(load), "pos_emb": "rotary", "max_position_embeddings": 64, "seq_length": 48, "rotary_emb_base": 50_000}
    values = dense(corpus, tmp_path / "ours", hidden_dropout=0.0, **further)
    if own:
        with pytest.raises(ConfigError, match=r"'rotary_emb_base' = 50000: .* trained with 10000; finetune: true may change it"):
            train_losses(values)
    assert train_losses({**values, "finetune": True})[0] < straight[1][0]
    assert not own or "'rotary_emb_base' = 50000: the model in" in capsys.readouterr().out


@pytest.mark.parametrize("pos_emb", ["rotary", "alibi", "none", "sinusoidal"])
def test_a_run_goes_on_with_longer_texts_where_positions_have_no_table(corpus: Path, tmp_path: Path, pos_emb: str) -> None:
    values = dense(corpus, tmp_path / "run", pos_emb=pos_emb, resume_if_exists=True)
    train_losses({**values, "exit_interval": 4})
    losses = train_losses({**values, "max_position_embeddings": 64, "seq_length": 48})
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    ready = load_ready_model(tiny_config({**values, "max_position_embeddings": 80, "seq_length": 80}))
    assert ready.context_length == 80


def test_a_table_of_positions_does_not_grow(corpus: Path, tmp_path: Path) -> None:
    values = dense(corpus, tmp_path / "run", pos_emb="learned", train_iters=4)
    train_losses(values)
    longer = {**values, "max_position_embeddings": 64, "save": str(tmp_path / "longer"), "load": str(tmp_path / "run")}
    for finetune in (False, True):
        with pytest.raises(ConfigError, match=r"'max_position_embeddings' = 64: .*16 \(pos_emb: learned has a row of weights for each position"):
            train_losses({**longer, "finetune": finetune})


def test_parts_of_two_processes_go_on_without_their_optimizer(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    stored = torch.load(straight[0] / "global_step4/mp_rank_00_model_states.pt", weights_only=True)
    parts = [cut_for_rank(stored["module"], rank, 2, queries=32, kv=32, gated=False) for rank in range(2)]
    content = head(4, {**stored["args"], "model_parallel_size": 2}, optimizer=stored["optimizer"], **{key: stored[key] for key in KEPT})
    write_layers(tmp_path / "theirs", parts, content)
    values = dense(corpus, tmp_path / "ours", load=str(tmp_path / "theirs"))
    with pytest.raises(CheckpointError, match=r"has shape \[512, 32\], but the weight has \[256, 32\]. .*no_load_optim=true"):
        train_losses(values)
    losses = train_losses({**values, "no_load_optim": True})
    assert losses[0] == straight[1][4], "the weights, the random states and the data are where they were"
    assert len(losses) == 4


def test_other_padding_goes_on(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    values = dense(corpus, tmp_path / "ours", load=str(straight[0]), iteration=4, make_vocab_size_divisible_by=1024)
    losses = train_losses(values)
    assert len(losses) == 4
    assert losses[0] > straight[1][4], "512 tokens more that could follow"
    without = train_losses({**values, "save": str(tmp_path / "without"), "no_load_optim": True})
    assert without[0] == losses[0]
    assert without[2] != losses[2]


def test_an_optimizer_of_other_groups_is_refused(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    path = rewritten(tmp_path / "theirs", straight[0] / "global_step4")
    content = torch.load(path / "mp_rank_00_model_states.pt", weights_only=False)
    values = dense(corpus, tmp_path / "ours", load=str(tmp_path / "theirs"))
    missing = content["optimizer"]["state"][3].pop("exp_avg_sq")
    torch.save(content, path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"does not hold both averages of sequential.2.mlp.linear1.weight. .*no_load_optim=true"):
        train_losses(values)
    content["optimizer"]["state"][3]["exp_avg_sq"] = missing
    content["optimizer"]["param_groups"].pop()
    torch.save(content, path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"its optimizer has 1 groups of weights, which are not those of this model. .*no_load_optim=true"):
        train_losses(values)


def test_without_the_optimizers_state(corpus: Path, tmp_path: Path) -> None:
    for stage in (0, 1):
        values = dense(corpus, tmp_path / f"{stage}", zero_optimization={"stage": stage}, no_save_optim=True)
        train_losses({**values, "exit_interval": 4})
        path = tmp_path / f"{stage}/global_step4"
        assert not list(path.glob("*optim_states*"))
        assert torch.load(path / "mp_rank_00_model_states.pt", weights_only=True)["optimizer"] is None
        again = {**values, "resume_if_exists": True}
        with pytest.raises(CheckpointError, match=r"holds no optimizer state .*no_save_optim"):
            train_losses(again)
        assert len(train_losses({**again, "no_load_optim": True})) == 8
    with pytest.raises(ConfigError, match=r"'no_save_optim' = true: needs zero_optimization\.stage 0, 1 or 2"):
        tiny_config(TINY_DENSE, no_save_optim=True, zero_optimization={"stage": 3})


def test_what_upstream_compares_is_in_there(straight: tuple[Path, list[float]]) -> None:
    content = torch.load(straight[0] / "global_step4/mp_rank_00_model_states.pt", weights_only=True)
    assert content["lr_scheduler"] == {
        "start_lr": 1e-2,
        "warmup_iter": 0.08,
        "num_iters": 4,
        "decay_style": "cosine",
        "end_iter": 8,
        "min_lr": 1e-3,
    }, "GPT-NeoX compares it"
    assert content["args"]["padded_vocab_size"] == 512
    assert content["gqa_layout"] == "q,k,v"
    assert content["checkpoint_validation_logits"].shape == (16, 512)


def test_logits_are_compared_after_loading(
    corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    values = dense(corpus, tmp_path / "ours", load=str(straight[0]), iteration=4, checkpoint_validation_with_forward_pass=True)
    assert train_losses(values) == straight[1][4:], "nothing random is drawn for it"
    assert "the loaded model's logits agree with the saved ones (largest difference 0, largest logit" in capsys.readouterr().out
    path = rewritten(tmp_path / "theirs", straight[0] / "global_step4")
    train_losses({**values, "save": str(tmp_path / "b"), "load": str(tmp_path / "theirs"), "exit_interval": 1})
    assert "holds no logits, so the model cannot be checked" in capsys.readouterr().out
    content = torch.load(path / "mp_rank_00_model_states.pt", weights_only=False)
    stored = torch.load(straight[0] / "global_step4/mp_rank_00_model_states.pt", weights_only=True)["checkpoint_validation_logits"]
    torch.save({**content, "checkpoint_validation_logits": stored * 1.01}, path / "mp_rank_00_model_states.pt")
    message = r"does not give the logits of the saved model\. They differ by up to \S+ \(allowed: \S+, the largest is \S+\)\. Load it with"
    with pytest.raises(CheckpointError, match=message):
        train_losses({**values, "save": str(tmp_path / "c"), "load": str(tmp_path / "theirs")})


def test_asked_for_and_not_there(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    values = dense(corpus, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of iteration 5\. It holds: 4, 8\."):
        train_losses({**values, "load": str(straight[0]), "iteration": 5})
    nowhere = re.escape(f"{tmp_path / 'run'} holds no checkpoint")
    with pytest.raises(
        CheckpointError, match=rf"{nowhere} .*To start from new weights, leave `load` out\. .*write `resume_if_exists: true` in place of `load`"
    ):
        train_losses({**values, "load": str(tmp_path / "run")})


def test_a_checkpoint_that_does_not_say_its_iteration(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    path = rewritten(tmp_path / "theirs", straight[0] / "global_step4")
    content = torch.load(path / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save({key: value for key, value in content.items() if key != "iteration"}, path / "mp_rank_00_model_states.pt")
    values = dense(corpus, tmp_path / "ours", load=str(tmp_path / "theirs"))
    with pytest.raises(CheckpointError, match=r"does not say at which iteration it was saved: add `-o finetune=true`"):
        train_losses(values)


def test_loading_from_where_it_saves(corpus: Path, tmp_path: Path, straight: tuple[Path, list[float]]) -> None:
    """As NeoX's configurations have it: with resume_if_exists the first start is a start."""
    values = dense(corpus, tmp_path / "run", load=f"{tmp_path / 'run'}/", resume_if_exists=True)
    assert train_losses({**values, "exit_interval": 4}) == straight[1][:4]
    assert train_losses(values) == straight[1]


def test_a_trailing_slash_extra_iterations_and_a_few_kept(corpus: Path, tmp_path: Path) -> None:
    values = dense(corpus, tmp_path, checkpoint_factor=1.5, checkpoint_scale="log", extra_save_iters=[0, 6])
    train_losses({**values, "save": f"{tmp_path}/run/", "train_iters": 12})
    assert {path.name for path in (tmp_path / "run").glob("global_step*")} == {f"global_step{step}" for step in (0, 1, 2, 3, 5, 6, 7, 11, 12)}
    train_losses({**values, "save": f"{tmp_path}/few/", "train_iters": 12, "keep_last_n_checkpoints": 2})
    assert {path.name for path in (tmp_path / "few").glob("global_step*")} == {"global_step11", "global_step12"}


def test_a_run_that_goes_on_says_that_its_data_changed(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = dense(corpus, tmp_path / "run", resume_if_exists=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"mine{suffix}")
    values["data_path"] = str(tmp_path / "mine")
    train_losses({**values, "exit_interval": 4})
    capfd.readouterr()
    train_losses({**values, "exit_interval": 2})
    assert "The data is not what it was" not in "".join(capfd.readouterr())
    train_losses({**values, "split": "90, 5, 5"})
    said = " ".join("".join(capfd.readouterr()).split())
    assert f"The data is not what it was when {tmp_path}/run/global_step6 was saved: split was '80, 10, 10' and is '90, 5, 5'. The run goes" in said
