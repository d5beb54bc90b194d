"""A checkpoint written again for other processes: the same numbers, readable by this program in any layout and by GPT-NeoX, in little memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.checkpoint import layout, reshape
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.logical import LogicalCheckpoint
from megatron.checkpoint.reshape import reshape_checkpoint
from megatron.checkpoint.save import resolved_config_document
from megatron.checkpoint.save_weights import Division
from megatron.checkpoint.weights import Expected, load_model_weights
from megatron.config import config_from_dict
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE
from tests.checkpoint.layout_work import run, samples_by_step, values
from tests.checkpoint.test_layouts import EVERY, Saved, same_sums, save
from tests.checkpoint.test_upstream_layout import ARGS, BASE, weights
from tests.checkpoint.upstream import head, write_sequential
from tests.checkpoint.upstream_optimizer import AVERAGES, numbered


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(corpus, tmp_path_factory.mktemp("saved") / "run", "data 2, ZeRO 2")


@pytest.mark.parametrize(("division", "target"), [(Division(2, 2), "tensor 2"), (Division(1, 0), "one, ZeRO 1")], ids=["2 x 2", "1 x 0"])
def test_a_run_goes_on_from_what_was_written(corpus: Path, saved: Saved, tmp_path: Path, division: Division, target: str) -> None:
    written = reshape_checkpoint(saved.path, tmp_path / "new", division, Expected())
    assert written.compared == same_sums(saved.path, written.path) - 2 * len(LogicalCheckpoint(saved.path).shapes)  # shape and dtype are no checksums
    assert (tmp_path / "new" / "latest").read_text() == "global_step3"
    case = EVERY[target]
    outcomes = run(case.processes, values(corpus, load=str(tmp_path / "new"), **case.keys))
    assert outcomes[0].losses == pytest.approx(saved.outcomes[0].losses, abs=1e-5)
    assert samples_by_step(outcomes, case.replicas) == samples_by_step(saved.outcomes, EVERY["data 2, ZeRO 2"].replicas)


def test_the_files_are_those_that_gpt_neox_reads(saved: Saved, tmp_path: Path) -> None:
    path = reshape_checkpoint(saved.path, tmp_path, Division(2, 2), Expected()).path
    layers = [0, 2, 3, 5, 6]
    assert sorted(file.name for file in path.iterdir()) == sorted(
        [
            *(f"layer_{layer:02d}-model_{process:02d}-model_states.pt" for layer in layers for process in range(2)),
            *(f"layer_{layer:02d}-optim_states.pt" for layer in layers),
            *(f"mp_rank_{process:02d}_model_states.pt" for process in range(4)),
            "configs",
            "division.json",
            "manifest.json",
        ]
    )
    whole = load_model_weights(saved.path).state_dict
    (path / layout.DIVISION).unlink()  # as a program that does not know it
    joined = load_model_weights(path).state_dict
    assert set(joined) == set(whole)
    assert all(torch.equal(joined[name], tensor) for name, tensor in whole.items())
    assert torch.load(path / "mp_rank_03_model_states.pt", weights_only=True)["args"]["model_parallel_size"] == 2


def upstream_checkpoint(directory: Path, **keys: Any) -> Path:
    """A ZeRO-0 checkpoint of GPT-NeoX."""
    state = weights(**keys)
    kinds = {kind: {name: tensor * (number + 2) for name, tensor in state.items()} for number, kind in enumerate(("master", *AVERAGES))}
    return write_sequential(directory, [state], head(7, ARGS, optimizer=numbered(kinds, steps=7, form="copies")))


def test_biases_that_gpt_neox_adds_up(tmp_path: Path) -> None:
    path = upstream_checkpoint(tmp_path / "theirs", gpt_j_residual=True, pos_emb="rotary")
    new = reshape_checkpoint(path, tmp_path / "new", Division(2, 1, parallel_residual=True), Expected(parallel_residual=True)).path
    name = "sequential.2.attention.dense.bias"
    bias = load_model_weights(path).state_dict[name]
    stored = [torch.load(new / f"layer_02-model_{process:02d}-model_states.pt", weights_only=True)["attention.dense.bias"] for process in range(2)]
    assert torch.equal(stored[0] + stored[1], bias)
    assert torch.equal(load_model_weights(new, Expected(parallel_residual=True)).state_dict[name], bias)


def test_a_difference_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = upstream_checkpoint(tmp_path / "theirs")
    original = reshape.write_tensors

    def dropping(content: Any, file: Path) -> Any:
        if file.name == "layer_03-optim_states.pt":
            content["sequential.3.mlp.linear2.weight"]["exp_avg"] = content["sequential.3.mlp.linear2.weight"]["exp_avg"] * 1.0001
        return original(content, file)

    monkeypatch.setattr(reshape, "write_tensors", dropping)
    with pytest.raises(CheckpointError, match=r"exp_avg of sequential.3.mlp.linear2.weight was not written as it was read"):
        reshape_checkpoint(path, tmp_path / "new", Division(), Expected())
    assert not list((tmp_path / "new").iterdir())


def test_a_source_that_is_not_as_its_manifest_says(saved: Saved, tmp_path: Path) -> None:
    manifest = json.loads((saved.path / layout.MANIFEST).read_text())
    before = (saved.path / layout.MANIFEST).read_text()
    manifest[layout.TENSORS]["sequential.0.word_embeddings.weight"]["weight"] = "0" * 16
    (saved.path / layout.MANIFEST).write_text(json.dumps(manifest))
    try:
        with pytest.raises(
            CheckpointError, match=r"weight of sequential.0.word_embeddings.weight in .* has the checksum \w+, but its manifest says 0"
        ):
            reshape_checkpoint(saved.path, tmp_path, Division(2, 1), Expected())
    finally:
        (saved.path / layout.MANIFEST).write_text(before)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = upstream_checkpoint(tmp_path / "theirs")
    message = "sequential.0.word_embeddings.weight of shape [64, 16] cannot be divided into 3 equal parts along dimension 0"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        reshape_checkpoint(path, tmp_path / "new", Division(3, 1), Expected())
    with pytest.raises(CheckpointError, match=r"global_step7 exists already: choose another directory, or delete it"):
        reshape_checkpoint(path, path.parent, Division(2, 1), Expected())


LAYERS, WIDTH = 8, 256


def wide_state() -> dict[str, torch.Tensor]:
    """The large weights of a model, under GPT-NeoX's names."""
    shapes = {
        "input_layernorm.weight": (WIDTH,),
        "attention.query_key_value.weight": (3 * WIDTH, WIDTH),
        "attention.dense.weight": (WIDTH, WIDTH),
        "mlp.linear1.weight": (4 * WIDTH, WIDTH),
        "mlp.linear2.weight": (WIDTH, 4 * WIDTH),
    }
    return {f"sequential.{layer + 2}.{name}": torch.full(shape, layer + 0.5) for layer in range(LAYERS) for name, shape in shapes.items()}


def peak_growth(directory: str, stages: int) -> tuple[int, int]:
    """(bytes that the process grew by at most, bytes of the checkpoint) while it is written again for two processes."""
    path = Path(directory) / "theirs" / "global_step7"
    reshape_checkpoint(upstream_checkpoint(Path(directory) / "small"), Path(directory) / "first", Division(2, stages), Expected())  # code comes in
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    reshape_checkpoint(path, Path(directory) / f"new{stages}", Division(2, stages), Expected())
    return _peak() - before, sum(file.stat().st_size for file in path.iterdir())


def _peak() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux")
def test_about_one_layer_is_in_memory(tmp_path: Path) -> None:
    size = {"num_layers": LAYERS, "hidden_size": WIDTH}
    state = wide_state()
    kinds = {kind: {name: tensor + number for name, tensor in state.items()} for number, kind in enumerate(AVERAGES, 1)}
    write_sequential(tmp_path / "theirs", [state], head(7, {**ARGS, **size}, optimizer=numbered(kinds, steps=7, form="plain")))
    ((grown, total),) = run_distributed(peak_growth, 1, str(tmp_path), 1, backend=None)
    layer = 3 * 4 * 12 * WIDTH**2
    assert total > LAYERS * layer
    assert grown < 3 * layer + 4_000_000, f"{grown:,} bytes for layers of {layer:,}"


def test_the_command(tmp_path: Path, tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    path = upstream_checkpoint(tmp_path / "theirs")
    (path / layout.CONFIGS).mkdir()
    for name, text in resolved_config_document(config_from_dict({**TINY_DENSE, **BASE}).flat()).items():
        (path / layout.CONFIGS / name).write_text(text)
    assert tool("tools/ckpts/reshape.py").main([str(path.parent), str(tmp_path / "new"), "--model-parallel-size", "2"]) == 0
    printed = capsys.readouterr()
    assert f"Wrote {tmp_path / 'new' / 'global_step7'}. 0 checksums of {path} were compared, and all new files were read again." in printed.out
    assert "Reshaping" in printed.err
    assert tool("tools/ckpts/reshape.py").main([str(path.parent), str(tmp_path / "new"), "--model-parallel-size", "2"]) == 1
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool("tools/ckpts/reshape.py").main([str(path), str(tmp_path / "new"), "--pipe-parallel-size", "-1"])
    assert "'-1' is not a number from 0 on" in capsys.readouterr().err
