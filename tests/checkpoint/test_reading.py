"""Nothing inside a checkpoint runs, and what is no checkpoint is refused with a sentence."""

from __future__ import annotations

import os
import random
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.load import CheckpointError, check_has_optimizer, find_checkpoint, load_model_weights
from megatron.checkpoint.random_state import capture_random_state, restore_random_state
from megatron.checkpoint.reading import read_file
from megatron.checkpoint.weights import inspect_checkpoint
from tests.checkpoint.made import MODEL_FILE, make_checkpoint


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("where", ["module", "iteration"])
def test_a_malicious_checkpoint_is_refused(tmp_path: Path, where: str) -> None:
    trap = tmp_path / "ran"
    content: dict[str, Any] = {"module": {}, "iteration": 1, where: Malicious(trap)}
    path = find_checkpoint(make_checkpoint(tmp_path / "run", 1, model=content).parent)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt is refused: it holds objects other than tensors.*system"):
        load_model_weights(path)
    assert not trap.exists()


def test_what_is_refused_is_named_and_what_to_do(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1, model={"module": {}, "queue": deque([1]), "when": timedelta(1)})
    message = r"refused: it holds .* \(collections\.deque, datetime\.timedelta\)\. If you trust .*torch\.load\(file, weights_only=False\)"
    with pytest.raises(CheckpointError, match=message):
        load_model_weights(path)
    torch.save({"module": {}, "queue": deque([1])}, path / MODEL_FILE, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"refused: it holds .*GLOBAL collections\.deque"):
        load_model_weights(path)


def test_weights_of_a_directory_or_a_checkpoint(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    for place in (path, tmp_path, str(tmp_path)):
        weights = load_model_weights(place)
        assert weights.state_dict["weight"].tolist() == [3.0] * 4
        assert (weights.config, weights.client_state) == ({}, {"iteration": 3})


def test_a_pipelines_layer_files_are_put_together(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3, model={"module": None, "iteration": 3, "dp_world_size": 1}, manifest=False)
    for index in (0, 2, 10):
        torch.save({"norm.weight": torch.full((2,), float(index))}, path / f"layer_{index:02d}-model_00-model_states.pt")
    weights = load_model_weights(tmp_path)
    assert {name: tensor.tolist() for name, tensor in weights.state_dict.items()} == {f"sequential.{i}.norm.weight": [i, i] for i in (0, 2, 10)}
    assert weights.client_state == {"iteration": 3}
    with pytest.raises(CheckpointError, match=r"holds no optimizer state .*add `-o no_load_optim=true`"):
        check_has_optimizer(path)
    torch.save({}, path / "layer_00-model_01-model_states.pt")
    missing = r"layer_02-model_01-model_states.pt, layer_10-model_01-model_states.pt missing\. It was saved with model_parallel_size 2"
    with pytest.raises(CheckpointError, match=missing):
        load_model_weights(tmp_path)


def test_files_in_torchs_old_format_are_read(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3, manifest=False)
    torch.save({"module": {"weight": torch.ones(2)}}, path / MODEL_FILE, _use_new_zipfile_serialization=False)
    assert load_model_weights(path).state_dict["weight"].tolist() == [1, 1]


@pytest.mark.parametrize("content", [{"weight": 1}, {"module": None}, [1]])
def test_files_without_weights_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights \(no 'module' entry\)"):
        load_model_weights(make_checkpoint(tmp_path, 3, model=content))


def test_directories_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model weights"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a tensor", b"PK\x03\x04"])
def test_files_that_are_no_tensors_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.pt (cannot be read: it is damaged|is refused)"):
        read_file(file, mmap=False)


def test_truncated_file_of_another_program(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3, manifest=False)
    (path / MODEL_FILE).write_bytes((path / MODEL_FILE).read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt (cannot be read: it is damaged|is refused)"):
        load_model_weights(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x.pt is missing"):
        read_file(tmp_path / "x.pt", mmap=True)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[1]", "holds a list, not the keys")])
def test_damaged_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = make_checkpoint(tmp_path, 3)
    (path / "configs" / "resolved.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"resolved.json {message}"):
        load_model_weights(path)


@pytest.mark.parametrize(("size", "message"), [(3, "too few for b"), (9, "the parameters take 6")])
def test_zero3_files_that_contradict_each_other(tmp_path: Path, size: int, message: str) -> None:
    shapes = [{"a": torch.Size([2]), "b": torch.Size([2, 2])}]
    path = make_checkpoint(tmp_path, 3, manifest=False)
    (path / MODEL_FILE).rename(path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    model = {"module": {"a": torch.empty(0), "b": torch.empty(0)}, "buffer_names": [], "param_shapes": shapes, "dp_world_size": 1}
    torch.save(model, path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(size)]}}, path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model_weights(path)


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()]


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    draw()
    torch.save(capture_random_state(), tmp_path / "x.pt")
    expected = [draw(), draw()]
    restore_random_state(read_file(tmp_path / "x.pt", mmap=False))
    assert [draw(), draw()] == expected


def test_neoxs_own_random_state_is_read(tmp_path: Path) -> None:
    # NeoX stores NumPy's state with its array in it.
    state = {**capture_random_state(), "np_rng_state": np.random.get_state()}
    torch.save(state, tmp_path / "x.pt")
    expected = draw()
    restore_random_state(read_file(tmp_path / "x.pt", mmap=False))
    assert draw() == expected


def test_random_states_that_cannot_be_used() -> None:
    state = capture_random_state()
    with pytest.raises(CheckpointError, match=r"no random state \(torch_rng_state missing\).*no_load_rng"):
        restore_random_state({key: value for key, value in state.items() if key != "torch_rng_state"})
    with pytest.raises(CheckpointError, match=r"cannot be used .*no_load_rng"):
        restore_random_state({**state, "torch_rng_state": torch.zeros(3, dtype=torch.uint8)})
