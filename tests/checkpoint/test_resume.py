"""Saving and loading real DeepSpeed engines: bit for bit, for every ZeRO stage, on one process and on two; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import layout
from megatron.checkpoint.load import CheckpointError, find_checkpoint, load_model_weights
from megatron.checkpoint.random_state import derive_random_state
from tests.checkpoint import rank_work
from tests.checkpoint.conftest import ONE, TWO
from tests.checkpoint.toy import content

Saved = dict[int, list[dict[tuple[str, int], dict[str, Any]]]]


@pytest.fixture(scope="session")
def saved(one: dict[str, Any], two: list[dict[str, Any]]) -> Saved:
    """By number of processes: what each rank's `save_and_resume` returned."""
    return {1: [one["save_and_resume"]], 2: [results["save_and_resume"] for results in two]}


@pytest.mark.parametrize(("world_size", "dtype", "stage"), [(1, *case) for case in ONE] + [(2, *case) for case in TWO])
def test_resuming_equals_going_on(saved: Saved, world_size: int, dtype: str, stage: int) -> None:
    for rank, results in enumerate(saved[world_size]):
        result = results[dtype, stage]
        assert result["resumed"] == result["straight"], f"rank {rank}"
        assert result["client_state"] == {**rank_work.CLIENT_STATE, "iteration": 3}
        assert result["global_steps"] == 6


def test_ranks_have_their_own_random_state(saved: Saved) -> None:
    first, second = (results["fp32", 1]["straight"] for results in saved[2])
    assert first != second


@pytest.mark.parametrize(("dtype", "stage"), TWO)
def test_weights_are_read_without_an_engine(saved: Saved, dtype: str, stage: int) -> None:
    path = Path(saved[2][0][dtype, stage]["saved_again"])
    weights = load_model_weights(path)
    model = weights.state_dict
    assert weights.config == {"hidden_size": 7}
    assert weights.client_state["iteration"] == 6
    assert weights.client_state["structmoe"] == rank_work.CLIENT_STATE["structmoe"]
    assert not set(weights.client_state) & layout.DEEPSPEED_KEYS
    assert model["layers.1.weight"].dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert torch.equal(model["head.weight"], model["layers.0.weight"])
    assert torch.equal(model["scale"].float(), torch.full((7,), 0.5))
    assert {name: tuple(tensor.shape) for name, tensor in model.items()} == {
        **{f"layers.{i}.weight": (7, 7) for i in range(2)},
        **{f"layers.{i}.bias": (7,) for i in range(2)},
        "head.weight": (7, 7),
        "scale": (7,),
        "offset": (7,),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_zero3_weights_are_put_together_as_they_were(saved: Saved, world_size: int) -> None:
    # Stages 1 to 3 do the same arithmetic: their weights must agree, however they are cut up.
    merged = load_model_weights(saved[world_size][0]["bf16", 3]["saved"]).state_dict
    whole = load_model_weights(saved[world_size][0]["bf16", 1]["saved"]).state_dict
    for name, tensor in whole.items():
        torch.testing.assert_close(merged[name].float(), tensor.float(), rtol=1e-2, atol=1e-3)


def test_files_are_named_as_neox_names_them(saved: Saved) -> None:
    path = Path(saved[2][0]["bf16", 1]["saved"])
    assert path.name == "global_step3"
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "configs/a.yml",
        "configs/b.yml",
        "configs/resolved.json",
        "division.json",
        "manifest.json",
        "mp_rank_00_model_states.pt",
        "rng_state_rank_01.pt",
    ]
    assert (path.parent / "latest").read_text() == "global_step6"
    assert (path / "configs/a.yml").read_text() == "x: 1\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["iteration"], manifest["world_size"], manifest["zero_stage"]) == (3, 2, 1)
    assert set(manifest["files"]) == {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {"manifest.json"}


def test_weights_alone_go_from_any_stage_into_any_other(afterwards: dict[str, Any], weight_paths: list[str]) -> None:
    results = afterwards["load_weights_only"]
    for path in weight_paths:
        stored = content(load_model_weights(path).state_dict)
        assert {results[path, stage]["content"] for stage in (0, 2, 3)} == {stored}
        assert results[path, 0]["losses"] == results[path, 2]["losses"]
        assert results[path, 0]["losses"] == pytest.approx(results[path, 3]["losses"], rel=1e-5)
        assert results[path, 0]["global_steps"] == 2


def test_stages_1_and_2_read_each_other(saved: Saved, two: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(two):
        for source in (1, 2):
            assert results["resume_in_other_stage"][source] == saved[2][rank]["fp32", source]["straight"]


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (
            "width",
            [
                "a model with other weights",
                "layers.0.weight is [7, 7] in the checkpoint and [5, 5] in this run",
                "and 3 more",
                "configs",
            ],
        ),
        ("depth", ["a model with other weights", "layers.2.weight [7, 7] is missing in the checkpoint"]),
        ("args", ["checkpoint of another model", "num_attention_heads is 1 in the checkpoint and 2 in this run"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(afterwards: dict[str, Any], case: str, parts: list[str]) -> None:
    for part in parts:
        assert part in afterwards["refusals"]["sentences"][case]


def test_a_refused_checkpoint_changes_nothing(afterwards: dict[str, Any]) -> None:
    assert afterwards["refusals"]["untouched"]


def test_zero0_loads_at_any_number_of_processes(saved: Saved, two: list[dict[str, Any]]) -> None:
    stored = content(load_model_weights(saved[1][0]["fp32", 0]["saved"]).state_dict)
    for rank, result in enumerate(results["load_at_another_size"] for results in two):
        derive_random_state(seed=0, iteration=3, data_parallel_rank=rank)
        assert result["random"] == torch.rand(1).item()
        assert result["content"] == stored


@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
def test_a_number_that_differs_on_one_process_is_found(two: list[dict[str, Any]], kind: str) -> None:
    """Also where other processes hold the same weight."""
    what = {"weight": "the weight itself", "exp_avg": "exp_avg"}[kind]
    for results in two:
        assert f"was not loaded as it was saved: {what} of layers.1.weight has the checksum" in results["changed_on_the_last_rank"][kind]


def test_another_programs_random_state_is_the_first_processs(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    first, second = (results["load_foreign"] for results in two)
    assert first["steps"] == second["steps"] == 3
    generator = torch.Generator()
    generator.set_state(torch.load(f"{one['save_gpt']}/mp_rank_00_model_states.pt", weights_only=True)["torch_rng_state"])
    assert first["random"] == torch.rand(1, generator=generator).item()
    assert second["random"] == torch.rand(1, generator=torch.Generator().manual_seed(78)).item()


def test_deepspeeds_pipeline_module_reads_and_writes_the_same_layer_files(one: dict[str, Any]) -> None:
    assert one["pipeline_module"] == {"read": True, "written": True, "names": True}


def test_a_step_saved_again_replaces_the_old_one(one: dict[str, Any]) -> None:
    *_, last, stored, names = one["replace_same_step"]
    assert stored == last
    assert names == "global_step7,latest"


def test_client_state_that_could_not_be_read_back_is_refused(one: dict[str, Any], root: Path) -> None:
    reserved, path, nested = one["bad_client_states"]
    assert "client_state key 'optimizer' is used by DeepSpeed" in reserved
    assert "client_state['structmoe']['path'] is a PosixPath: only tensors" in path
    assert "client_state['list'][1][1] is a set" in nested
    assert not (root / "bad").exists()


def test_without_random_states(one: dict[str, Any], root: Path) -> None:
    assert "holds no random state" in one["save_without_rng"]
    assert "torch_rng_state" not in load_model_weights(root / "without_rng").client_state


def test_zero3_with_a_missing_part_is_named(saved: Saved, tmp_path: Path) -> None:
    source = Path(saved[2][0]["fp32", 3]["saved"])
    target = tmp_path / "global_step3"
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".pt" and file.name != "zero_pp_rank_1_mp_rank_00_optim_states.pt":
            (target / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"saved by 2 processes but holds 1 \*_optim_states.pt files"):
        load_model_weights(target)


def test_bytes_that_flip_are_noticed(saved: Saved, tmp_path: Path) -> None:
    source = Path(saved[1][0]["fp32", 0]["saved"])
    file = source / "mp_rank_00_model_states.pt"
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    try:
        with pytest.raises(
            CheckpointError, match=r"mp_rank_00_model_states.pt is damaged: expected SHA-256 .*newest undamaged checkpoint is that of iteration 6"
        ):
            find_checkpoint(source.parent, 3)
    finally:
        file.write_bytes(whole)
    assert find_checkpoint(source.parent, 3) == source
