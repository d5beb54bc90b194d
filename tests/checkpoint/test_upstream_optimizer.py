"""The optimizer's state of GPT-NeoX's runs, from every setting that it is written in: the same averages and float32 copies come out, whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.held import MASTER, WEIGHT
from megatron.checkpoint.logical import LogicalCheckpoint
from megatron.checkpoint.save_weights import Division, save_weights
from megatron.checkpoint.weights import Expected
from megatron.model.division import Cut, Span
from tests.checkpoint.layout_work import run, samples_by_step, values
from tests.checkpoint.test_layouts import EVERY, save
from tests.checkpoint.test_upstream_layout import ARGS, LLAMA, shards, weights
from tests.checkpoint.upstream import cut_for_rank, head, renamed, with_llama_names, write_layers, write_sequential
from tests.checkpoint.upstream_optimizer import AVERAGES, Zero, numbered, write_zero

STEPS = 7
KINDS = ("master", *AVERAGES)
Kinds = dict[str, dict[str, Tensor]]


def whole_state(**keys: Any) -> Kinds:
    """Float32 copies, averages and squares of a model, every number different."""
    state = weights(**keys)
    return {kind: {name: tensor * (number + 1) + number for name, tensor in state.items()} for number, kind in enumerate(KINDS)}


def parts_of(kinds: Kinds, count: int, **settings: Any) -> list[Kinds]:
    """By tensor-parallel process."""
    by_kind = {kind: shards(state, count, **settings) for kind, state in kinds.items()}
    return [{kind: parts[process] for kind, parts in by_kind.items()} for process in range(count)]


def content(count: int, **changes: Any) -> dict[str, Any]:
    return head(STEPS, {**ARGS, "model_parallel_size": count}, **changes)


def check(path: Path, kinds: Kinds, expected: Expected | None = None) -> LogicalCheckpoint:
    """Whole tensors, and the part of a process of another layout."""
    checkpoint = LogicalCheckpoint(path, expected)
    for kind, state in kinds.items():
        for name, tensor in state.items():
            assert torch.equal(checkpoint.read(name, kind, checkpoint.whole(name)), tensor), (kind, name)
            assert checkpoint.sources.steps[name] == STEPS
    name = "sequential.2.attention.query_key_value.weight"
    rows, columns = kinds["exp_avg"][name].shape
    cut = Cut((rows, columns), ((Span(5, 9), Span(rows - 3, rows)), (Span(1, 4),)))
    assert torch.equal(checkpoint.read(name, "exp_avg", cut), cut.take(kinds["exp_avg"][name]))
    return checkpoint


@pytest.mark.parametrize("prefix", ["", "bf16_"])
@pytest.mark.parametrize(("count", "replicas", "list_form"), [(1, 1, False), (1, 3, True), (2, 2, False)])
def test_zero_of_one_stage(tmp_path: Path, count: int, replicas: int, prefix: str, list_form: bool) -> None:
    kinds = whole_state()
    parts = parts_of(kinds, count)
    path = write_sequential(tmp_path, [{name: t.bfloat16() for name, t in part["master"].items()} for part in parts], content(count))
    for process, part in enumerate(parts):
        shapes = write_zero(path, process, part, Zero(replicas, prefix, STEPS, list_form))
        file = path / f"mp_rank_{process:02d}_model_states.pt"
        torch.save({**torch.load(file, weights_only=False), "param_shapes": shapes, "dp_world_size": replicas}, file)
    checkpoint = check(path, kinds)
    name = "sequential.2.mlp.linear2.weight"
    assert torch.equal(checkpoint.read(name, WEIGHT, checkpoint.whole(name)), kinds["master"][name].bfloat16())


@pytest.mark.parametrize("count", [1, 2])
def test_zero_of_two_stages(tmp_path: Path, count: int) -> None:
    """In a pipeline names begin with the number of the layer; each stage has its own files, `mp_rank` counts stages first."""
    kinds = whole_state()
    parts = parts_of(kinds, count)
    path = write_layers(tmp_path, [part["master"] for part in parts], content(count), stages=2)
    for stage, layers in enumerate(("02", "3456")):
        for process, part in enumerate(parts):
            own = {
                kind: {name.removeprefix("sequential."): t for name, t in state.items() if name.split(".")[1] in layers}
                for kind, state in part.items()
            }
            number = stage * count + process
            shapes = write_zero(path, number, own, Zero(2, "bf16_"))
            file = path / f"mp_rank_{number:02d}_model_states.pt"
            torch.save({**torch.load(file, weights_only=False), "param_shapes": shapes, "dp_world_size": 2}, file)
    check(path, kinds)


@pytest.mark.parametrize("form", ["plain", "copies", "flat"])
@pytest.mark.parametrize("count", [1, 2])
def test_without_zero(tmp_path: Path, count: int, form: str) -> None:
    kinds = whole_state()
    path = write_sequential(tmp_path, [part["master"] for part in parts_of(kinds, count)], content(count))
    for process, part in enumerate(parts_of(kinds, count)):
        file = path / f"mp_rank_{process:02d}_model_states.pt"
        torch.save({**torch.load(file, weights_only=False), "optimizer": numbered(part, steps=STEPS, form=form)}, file)
    check(path, kinds if form != "plain" else {kind: kinds[kind] for kind in AVERAGES})


def llama_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return with_llama_names(state)


def gpt_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, lambda name: name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"))


@pytest.mark.parametrize(("model", "settings", "names"), [(LLAMA, {"kv": 8, "gated": True}, llama_names), ({}, {}, gpt_names)], ids=["llama", "gpt"])
def test_old_names(
    tmp_path: Path, model: dict[str, Any], settings: dict[str, Any], names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    kinds = whole_state(**model)
    parts = [{kind: names(state) for kind, state in part.items()} for part in parts_of(kinds, 2, **settings)]
    path = write_sequential(tmp_path, [part["master"] for part in parts], content(2))
    for process, part in enumerate(parts):
        shapes = write_zero(path, process, part, Zero(2))
        file = path / f"mp_rank_{process:02d}_model_states.pt"
        torch.save({**torch.load(file, weights_only=False), "param_shapes": shapes, "dp_world_size": 2}, file)
    check(path, kinds)


def test_grouped_queries_that_lie_head_by_head(tmp_path: Path) -> None:
    """Until November 2024: for each query head its rows, then its share of the keys and of the values."""
    kinds = whole_state(**LLAMA)

    def per_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
        def rows(tensor: Tensor) -> Tensor:
            queries, keys, values = tensor.split([8, 4, 4])
            heads = range(2)
            return torch.cat([part for h in heads for part in (queries[4 * h : 4 * h + 4], keys[2 * h : 2 * h + 2], values[2 * h : 2 * h + 2])])

        return {name: rows(tensor) if "query_key_value" in name else tensor for name, tensor in state.items()}

    parts = [{kind: per_head(state) for kind, state in part.items()} for part in parts_of(kinds, 2, kv=8, gated=True)]
    path = write_sequential(tmp_path, [part["master"] for part in parts], content(2))
    for process, part in enumerate(parts):
        shapes = write_zero(path, process, part, Zero(1))
        file = path / f"mp_rank_{process:02d}_model_states.pt"
        torch.save({**torch.load(file, weights_only=False), "param_shapes": shapes}, file)
    check(path, kinds, Expected(gqa_layout="per_head"))


def test_parallel_residuals_add_the_copies_of_biases_and_keep_their_averages(tmp_path: Path) -> None:
    kinds = whole_state(gpt_j_residual=True, pos_emb="rotary")
    parts = parts_of(kinds, 2)
    path = write_sequential(tmp_path, [part["master"] for part in parts], content(2))
    for process, part in enumerate(parts):
        shapes = write_zero(path, process, part, Zero(2))
        file = path / f"mp_rank_{process:02d}_model_states.pt"
        torch.save({**torch.load(file, weights_only=False), "param_shapes": shapes, "dp_world_size": 2}, file)
    checkpoint = LogicalCheckpoint(path, Expected(parallel_residual=True))
    name = "sequential.2.attention.dense.bias"
    whole = checkpoint.whole(name)
    assert torch.equal(checkpoint.read(name, WEIGHT, whole), 2 * kinds["master"][name])
    assert torch.equal(checkpoint.read(name, MASTER, whole), 2 * kinds["master"][name])
    assert torch.equal(checkpoint.read(name, "exp_avg", whole), kinds["exp_avg"][name])


def test_copies_that_drifted_apart_become_their_mean(tmp_path: Path) -> None:
    kinds = whole_state()
    parts = parts_of(kinds, 2)
    name = "sequential.2.input_layernorm.weight"
    for process, part in enumerate(parts):
        part["exp_avg"][name] = part["exp_avg"][name] + process
    path = write_sequential(tmp_path, [part["master"] for part in parts], content(2))
    for process, part in enumerate(parts):
        file = path / f"mp_rank_{process:02d}_model_states.pt"
        torch.save({**torch.load(file, weights_only=False), "optimizer": numbered(part, steps=STEPS, form="plain")}, file)
    checkpoint = LogicalCheckpoint(path)
    assert torch.allclose(checkpoint.read(name, "exp_avg", checkpoint.whole(name)), kinds["exp_avg"][name] + 0.5)


def test_a_run_of_gpt_neox_goes_on_in_other_layouts(corpus: Path, tmp_path: Path) -> None:
    """A run of ours, written as GPT-NeoX's two tensor-parallel processes and two replicas with ZeRO 1 would have written it."""
    saved = save(corpus, tmp_path / "run", "one")
    ours = LogicalCheckpoint(saved.path)
    names = [name for name in ours.shapes if ours.kinds(name)]
    kinds = {kind: {name: ours.read(name, kind, ours.whole(name)) for name in names} for kind in (WEIGHT, *AVERAGES)}
    kinds = {"master": kinds.pop(WEIGHT), **kinds}
    parts = [{kind: cut_for_rank(state, process, 2, queries=32, kv=32, gated=False) for kind, state in kinds.items()} for process in range(2)]
    counts = {"lr_scheduler": ours.head["lr_scheduler"], "dp_world_size": 2, "global_steps": 3}
    path = write_sequential(tmp_path / "theirs", [part["master"] for part in parts], head(3, {"model_parallel_size": 2}, **counts))
    for process, part in enumerate(parts):
        shapes = write_zero(path, process, part, Zero(2, steps=3))
        file = path / f"mp_rank_{process:02d}_model_states.pt"
        torch.save({**torch.load(file, weights_only=False), "param_shapes": shapes}, file)
    for target in ("one", "tensor 2, ZeRO 1"):
        case = EVERY[target]
        outcomes = run(case.processes, values(corpus, load=str(path.parent), **case.keys))
        assert outcomes[0].losses == pytest.approx(saved.outcomes[0].losses, abs=1e-5)
        assert samples_by_step(outcomes, case.replicas) == samples_by_step(saved.outcomes, [0])


def test_weights_that_this_program_wrote_for_two_processes_of_gpt_neox(tmp_path: Path) -> None:
    state = weights(**LLAMA)
    client_state = {"iteration": STEPS, "args": {**ARGS, "model_parallel_size": 2}}
    path = save_weights(tmp_path, state.items(), client_state=client_state, documents={}, division=Division(2, 1))
    checkpoint = LogicalCheckpoint(path, optimizer=False)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert all(torch.equal(checkpoint.read(name, WEIGHT, checkpoint.whole(name)), tensor) for name, tensor in state.items())


def test_a_state_of_another_shape_is_named(tmp_path: Path) -> None:
    kinds = whole_state()
    name = "sequential.2.attention.dense.weight"
    kinds["exp_avg"][name] = kinds["exp_avg"][name][:-1]
    path = write_sequential(tmp_path, [kinds["master"]], content(1, optimizer=numbered(kinds, steps=STEPS, form="plain")))
    with pytest.raises(CheckpointError, match=rf"exp_avg of {name} has shape \[15, 16\], but the weight has \[16, 16\]"):
        LogicalCheckpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    kinds = whole_state()
    path = write_sequential(tmp_path, [kinds["master"]], content(1))
    shapes = write_zero(path, 0, kinds, Zero(2))
    file = path / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file, weights_only=False), "param_shapes": shapes, "dp_world_size": 2}, file)
    (path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"saved by 2 data-parallel processes but holds 1 \*_mp_rank_00_optim_states.pt"):
        LogicalCheckpoint(path)
