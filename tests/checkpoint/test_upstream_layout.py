"""GPT-NeoX's checkpoints, from every setting that it writes them in: the same weights come out, and what is missing is named."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.load import check_args, check_has_optimizer
from megatron.checkpoint.logical import LogicalCheckpoint
from megatron.checkpoint.random_state import restore_random_state
from megatron.checkpoint.weights import Expected, load_model_weights
from megatron.config import config_from_dict
from megatron.model.gpt import build_model
from tests.checkpoint.upstream import cut_for_rank, head, renamed, with_llama_names, write_layers, write_sequential

ARGS = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "make_vocab_size_divisible_by": 32,
    "padded_vocab_size": 64,
    "tokenizer_type": "HFTokenizer",
    "model_parallel_size": 1,
}
BASE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 8, "max_position_embeddings": 8, "no_weight_tying": True}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "intermediate_size": 48, "pos_emb": "rotary", "use_bias_in_mlp": False}
NOT_OURS = "Written by another program, without checksums: its files cannot be checked for damage."


def weights(**keys: Any) -> dict[str, Tensor]:
    """Weights of a model with 64 rows, every one of them different."""
    config = config_from_dict({**BASE, **keys})
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(t.shape, generator=generator) for name, t in build_model(config.model, config.moe, 64, seed=1).state_dict().items()}


def shards(state: dict[str, Tensor], count: int, **settings: Any) -> list[dict[str, Tensor]]:
    return [cut_for_rank(state, rank, count, **{"queries": 16, "kv": 16, "gated": False, **settings}) for rank in range(count)]


def check_same(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("stages", [0, 1, 2])
def test_every_combination_of_pipeline_and_tensor_parallelism(tmp_path: Path, stages: int, tensor_parallel: int) -> None:
    state, content = weights(), head(7, {**ARGS, "model_parallel_size": tensor_parallel})
    parts = shards(state, tensor_parallel)
    if stages:
        path = write_layers(tmp_path, parts, content, stages=stages)
    else:
        path = write_sequential(tmp_path, parts, content)
    loaded = load_model_weights(tmp_path)
    check_same(loaded.state_dict, state)
    assert (loaded.client_state["iteration"], loaded.config) == (7, {})
    expected = [NOT_OURS] + (
        [f"Saved with model_parallel_size {tensor_parallel}: the parts of its weights are joined."] if tensor_parallel > 1 else []
    )
    assert loaded.notices == tuple(f"{path}: {notice}" for notice in expected)


def test_a_gated_model_with_grouped_queries_of_two_processes(tmp_path: Path) -> None:
    state = weights(**LLAMA)
    write_layers(tmp_path, shards(state, 2, kv=8, gated=True), head(7, {**ARGS, "model_parallel_size": 2}))
    loaded = load_model_weights(tmp_path)
    check_same(loaded.state_dict, state)
    assert "The rows of its grouped query/key/value projections are read as all queries, all keys, all values" in loaded.notices[2]


def test_old_llama_names_of_two_processes(tmp_path: Path) -> None:
    state = weights(**LLAMA)
    write_sequential(tmp_path, [with_llama_names(part) for part in shards(state, 2, kv=8, gated=True)], head(7, ARGS | {"model_parallel_size": 2}))
    loaded = load_model_weights(tmp_path)
    check_same(loaded.state_dict, state)
    assert "Names of weights from an older GPT-NeoX are translated: mlp.w2 -> mlp.linear2; mlp.w3 and mlp.w1 -> mlp.linear1." in loaded.notices[2]


def test_old_gpt_names_and_buffers(tmp_path: Path) -> None:
    state = weights()
    old = renamed(state, lambda name: "module." + name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"))
    old |= {f"module.sequential.{layer}.attention.rotary_emb.inv_freq": torch.ones(2) for layer in (2, 3)}
    content = head(7, ARGS)
    content["total_iters"] = content.pop("iteration")
    path = write_sequential(tmp_path, [old], content)
    loaded = load_model_weights(path)
    check_same(loaded.state_dict, state)
    assert loaded.client_state["iteration"] == 7
    assert [notice.removeprefix(f"{path}: ") for notice in loaded.notices[1:]] == [
        "Names of weights from an older GPT-NeoX are translated: module. -> nothing; mlp.dense_h_to_4h -> mlp.linear1; mlp.dense_4h_to_h "
        "-> mlp.linear2.",
        "Not read, because the configuration gives it: rotary_emb.inv_freq.",
    ]


def test_parallel_residuals_add_the_biases_of_all_processes(tmp_path: Path) -> None:
    state = weights(gpt_j_residual=True, pos_emb="rotary")
    write_sequential(tmp_path, shards(state, 2), head(7, {**ARGS, "model_parallel_size": 2}))
    loaded = load_model_weights(tmp_path, Expected(parallel_residual=True)).state_dict
    name = "sequential.2.attention.dense.bias"
    assert torch.equal(loaded[name], 2 * state[name])
    assert torch.equal(loaded[name.replace("bias", "weight")], state[name.replace("bias", "weight")])


def test_padding_rows_of_two_processes_are_left_out(tmp_path: Path) -> None:
    state = weights()
    path = write_layers(tmp_path, shards(state, 2), head(7, {**ARGS, "model_parallel_size": 2}))
    loaded = load_model_weights(path, Expected({"padded_vocab_size": 32}, vocab_size=30))
    for name in ("sequential.0.word_embeddings.weight", "sequential.6.final_linear.weight"):
        assert torch.equal(loaded.state_dict[name], state[name][:32])
    assert loaded.vocabulary_changed
    assert "32 padding rows are left out" in loaded.notices[-1]
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: .*has 64 rows, but the tokenizer has 65 entries, padded to 96"):
        load_model_weights(path, Expected({"padded_vocab_size": 96}, vocab_size=65))


@pytest.mark.parametrize(
    ("missing", "stages"),
    [("mp_rank_01_model_states.pt", 0), ("layer_03-model_01-model_states.pt", 1), ("layer_02-model_00-model_states.pt", 2)],
)
@pytest.mark.parametrize("says_so", [True, False])
def test_a_missing_file_is_named(tmp_path: Path, missing: str, stages: int, says_so: bool) -> None:
    content = head(7, {**ARGS, "model_parallel_size": 2} if says_so else {})
    parts = shards(weights(), 2)
    path = write_layers(tmp_path, parts, content, stages=stages) if stages else write_sequential(tmp_path, parts, content)
    (path / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"is incomplete: {missing} missing\. It was saved with model_parallel_size 2"):
        load_model_weights(tmp_path)


def test_a_whole_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write_layers(tmp_path, shards(weights(), 1), head(7, ARGS))
    (path / "layer_03-model_00-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: layer_03-model_00-model_states\.pt missing"):
        load_model_weights(tmp_path)


def test_parts_that_do_not_fit_are_named_with_their_path(tmp_path: Path) -> None:
    first, second = shards(weights(), 2)
    second["sequential.2.attention.dense.weight"] = torch.ones(3, 3)
    path = write_sequential(tmp_path, [first, second], head(7, {}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: sequential.2.attention.dense.weight has different shapes"):
        load_model_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1], " does not hold a dictionary of weights"), ({1: torch.ones(1)}, " does not hold"), ({"a": 1}, ": a is a int, not a tensor")],
)
@pytest.mark.parametrize("layers", [True, False])
def test_something_else_in_the_place_of_weights(tmp_path: Path, content: Any, message: str, layers: bool) -> None:
    if layers:
        torch.save(content, write_layers(tmp_path, shards(weights(), 1), head(7, ARGS)) / "layer_03-model_00-model_states.pt")
    else:
        write_sequential(tmp_path, [content], head(7, ARGS))
        message = message if isinstance(content, dict) else " holds no weights"
    with pytest.raises(CheckpointError, match=rf"model_states\.pt{message}"):
        load_model_weights(tmp_path)


def test_entries_of_transformer_engine_without_tensors(tmp_path: Path) -> None:
    state: dict[str, Any] = weights()
    write_sequential(tmp_path, [{**state, "sequential.2.attention.dense._extra_state": None}], head(7, ARGS))
    check_same(load_model_weights(tmp_path).state_dict, state)


@pytest.mark.parametrize("iteration", ["seven", -1, 1.5, None])
def test_an_iteration_that_is_none(tmp_path: Path, iteration: Any) -> None:
    write_sequential(tmp_path, shards(weights(), 1), {**head(7, ARGS), "iteration": iteration})
    with pytest.raises(CheckpointError, match=f"its iteration is {iteration!r}, which is not a number of steps"):
        load_model_weights(next(path for path in tmp_path.iterdir() if path.is_dir()))


def test_arguments_as_objects_are_read(tmp_path: Path) -> None:
    content = head(7, {}) | {"args": argparse.Namespace(**ARGS), "scalar": np.float64(1.5), "dtype": torch.bfloat16}
    path = write_sequential(tmp_path, shards(weights(), 1), content)
    assert load_model_weights(path).client_state["args"]["hidden_size"] == 16


def test_arguments_that_differ_are_all_named(tmp_path: Path) -> None:
    path = write_sequential(tmp_path, shards(weights(), 1), head(7, ARGS))
    stored = load_model_weights(path).client_state["args"]
    check_args(path, stored, {**ARGS, "make_vocab_size_divisible_by": 1, "padded_vocab_size": 50, "model_parallel_size": 4})
    message = (
        "another model: num_attention_heads is 4 in the checkpoint and 8 in this run; tokenizer_type is 'HFTokenizer' in the "
        "checkpoint and 'SPMTokenizer' in this run."
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check_args(path, stored, {**ARGS, "num_attention_heads": 8, "tokenizer_type": "SPMTokenizer"})


def test_zero_3_of_three_processes_by_hand(tmp_path: Path) -> None:
    """Each weight is cut into three parts of equal length, the last one padded."""
    whole = {"sequential.2.mlp.dense_h_to_4h.weight": torch.arange(8.0).view(4, 2), "sequential.2.mlp.dense_4h_to_h.bias": torch.arange(5.0) + 100}
    path = tmp_path / "global_step7"
    path.mkdir()
    shapes = [{name: tensor.shape for name, tensor in whole.items()}]
    empty = dict.fromkeys(whole, torch.empty(0, dtype=torch.bfloat16))
    content = head(7, ARGS, module=empty, param_shapes=shapes, dp_world_size=3)
    for rank in range(3):
        flat = torch.cat([torch.cat([t.flatten(), torch.zeros(9)])[rank * n : (rank + 1) * n] for t, n in zip(whole.values(), (3, 2), strict=True)])
        torch.save(content, path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = {"optimizer_state_dict": {"fp32_flat_groups": [flat[:2], flat[2:]]}}
        torch.save(state, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    loaded = load_model_weights(path).state_dict
    assert {name: tensor.dtype for name, tensor in loaded.items()} == dict.fromkeys(
        ("sequential.2.mlp.linear1.weight", "sequential.2.mlp.linear2.bias"), torch.bfloat16
    )
    assert [tensor.tolist() for tensor in loaded.values()] == [tensor.tolist() for tensor in whole.values()]


def test_zero_3_on_tensor_parallel_processes_is_refused(tmp_path: Path) -> None:
    path = write_sequential(tmp_path, shards(weights(), 1), head(7, ARGS))
    for rank in (0, 1):
        (path / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"saved with ZeRO 3 and model_parallel_size above 1 \(zero_pp_rank_0_mp_rank_01"):
        load_model_weights(path)


def test_a_later_layout_of_ours_is_refused(tmp_path: Path) -> None:
    path = write_sequential(tmp_path, shards(weights(), 1), head(7, ARGS, gqa_layout="k,q,v"))
    with pytest.raises(CheckpointError, match="in the order 'k,q,v', but this version knows only 'q,k,v': load it with the version that wrote it"):
        load_model_weights(path)


@pytest.mark.parametrize("changes", [{}, {"optimizer": {}}])
def test_a_checkpoint_without_optimizer_state(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_sequential(tmp_path, shards(weights(), 1), head(7, ARGS, **changes))
    with pytest.raises(CheckpointError, match=re.escape("holds no optimizer state (it was saved with no_save_optim, or converted)")) as caught:
        check_has_optimizer(path)
    assert "add `-o no_load_optim=true` to continue from the weights with a new optimizer state" in str(caught.value)


@pytest.mark.parametrize(
    ("count", "stages", "optimizer", "message"),
    [
        (2, 2, {"state": {}, "param_groups": []}, "was saved by 4 processes that divided the model, without ZeRO"),
        (1, 0, {"state": {}}, "its files are not in a form that this program knows (KeyError: 'param_groups')"),
        (1, 0, {"state": {}, "param_groups": [{"params": [0]}]}, "its optimizer has 1 groups of weights, which are not those of this model"),
    ],
)
def test_optimizer_states_that_cannot_be_read(tmp_path: Path, count: int, stages: int, optimizer: dict[str, Any], message: str) -> None:
    content, parts = head(7, ARGS | {"model_parallel_size": count}, optimizer=optimizer), shards(weights(), count)
    path = write_layers(tmp_path, parts, content, stages=stages) if stages else write_sequential(tmp_path, parts, content)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        LogicalCheckpoint(path)


def test_its_random_states_are_taken(tmp_path: Path) -> None:
    path = write_sequential(tmp_path, shards(weights(), 1), head(7, ARGS))
    expected = np.random.rand(), torch.rand(1).item()
    restore_random_state(load_model_weights(path).client_state)
    assert (np.random.rand(), torch.rand(1).item()) == expected
