"""Saved in one layout, resumed in others: the same losses, samples and tensors. Which ones, a seed decides, so that over time all pairs are tried."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron.checkpoint import layout
from megatron.checkpoint.weights import load_model_weights
from megatron.model.gpt import build_model
from megatron.mpu.topology import Layout, Topology
from megatron.testing.distributed import DistributedError
from megatron.testing.tiny import tiny_config
from tests.checkpoint.layout_work import MORE, Outcome, run, samples_by_step, values


class Case(NamedTuple):
    """A layout: so many processes with these keys."""

    processes: int
    keys: dict[str, Any]

    @property
    def replicas(self) -> list[int]:
        """The first process of each data-parallel rank."""
        parallel = Layout(
            self.keys.get("model_parallel_size", 1), max(1, self.keys.get("pipe_parallel_size", 1)), self.keys.get("moe_expert_parallel_size", 1)
        )
        topology = Topology(self.processes, layout=parallel)
        return [topology.rank_of(topology.place._replace(data=data)) for data in range(topology.data_parallel_size)]


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


TENSOR, EXPERT, PIPE = {"model_parallel_size": 2}, {"moe_expert_parallel_size": 2}, {"pipe_parallel_size": 2}
CASES = {
    "one": Case(1, {}),
    "one, a file for each layer": Case(1, {"pipe_parallel_size": 1}),
    "one, ZeRO 1": Case(1, zero(1)),
    "one, ZeRO 3": Case(1, zero(3)),
    "data 2": Case(2, {}),
    "data 2, ZeRO 1": Case(2, zero(1)),
    "data 2, ZeRO 2": Case(2, zero(2)),
    "data 2, ZeRO 3": Case(2, zero(3)),
    "tensor 2": Case(2, TENSOR),
    "tensor 2, ZeRO 1": Case(2, {**TENSOR, **zero(1)}),
    "expert 2": Case(2, EXPERT),
    "pipe 2": Case(2, PIPE),
    "pipe 2, ZeRO 1": Case(2, {**PIPE, **zero(1)}),
    "expert 2, ZeRO 2": Case(2, {**EXPERT, **zero(2)}),
}
OF_FOUR = {
    "data 4, ZeRO 1": Case(4, zero(1)),
    "data 4, ZeRO 3": Case(4, zero(3)),
    "tensor 4": Case(4, {"model_parallel_size": 4}),
    "tensor 2, data 2, ZeRO 2": Case(4, {**TENSOR, **zero(2)}),
    "tensor 2, data 2, ZeRO 3": Case(4, {**TENSOR, **zero(3)}),
    "pipe 2, data 2, ZeRO 1": Case(4, {**PIPE, **zero(1)}),
    "pipe 2, tensor 2": Case(4, {**PIPE, **TENSOR}),
    "pipe 2, expert 2": Case(4, {**PIPE, **EXPERT}),
    "tensor 2, expert 2": Case(4, {**TENSOR, **EXPERT}),
    "tensor 2, expert 2, ZeRO 1": Case(4, {**TENSOR, **EXPERT, **zero(1)}),
    "expert 2, data 4, ZeRO 1": Case(4, {**EXPERT, **zero(1)}),
}
EVERY = {**CASES, **OF_FOUR}
SEED = int(os.environ.get("LAYOUT_SEED", datetime.date.today().toordinal()))
"""Another one every day. The names of the cases say which layouts it chose; LAYOUT_SEED repeats a choice."""
SOURCE, *TARGETS = random.Random(SEED).sample(sorted(CASES), 7)


class Saved(NamedTuple):
    """A checkpoint after step 3, and what its run did afterwards."""

    path: Path
    outcomes: list[Outcome]


def save(corpus: Path, directory: Path, name: str, **keys: Any) -> Saved:
    case = EVERY[name]
    return Saved(directory / "global_step3", run(case.processes, values(corpus, **case.keys, **keys), save=directory))


def check_same(corpus: Path, saved: Saved, source: str, target: str, directory: Path, **keys: Any) -> None:
    """Goes on from a checkpoint in another layout, and compares with the run that saved it."""
    case = EVERY[target]
    outcomes = run(case.processes, values(corpus, load=str(saved.path.parent), **case.keys, **keys), again=directory)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(saved.outcomes[0].losses, abs=1e-5)
    assert len(outcomes[0].losses) == MORE
    assert samples_by_step(outcomes, case.replicas) == samples_by_step(saved.outcomes, EVERY[source].replicas)
    assert same_sums(saved.path, directory / "global_step3") > 50


def sums(path: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads((path / layout.MANIFEST).read_text())[layout.TENSORS])


def same_sums(one: Path, other: Path) -> int:
    """How many checksums both manifests have; they must be the same."""
    first, second = sums(one), sums(other)
    assert set(first) == set(second)
    both = [(name, kind) for name, entry in first.items() for kind in set(entry) & set(second[name])]
    assert {(name, kind): first[name][kind] for name, kind in both} == {(name, kind): second[name][kind] for name, kind in both}
    return len(both)


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(corpus, tmp_path_factory.mktemp("saved") / "run", SOURCE)


@pytest.mark.parametrize("target", [pytest.param(target, id=f"{SOURCE} to {target}") for target in TARGETS])
def test_a_run_goes_on_in_another_layout(corpus: Path, saved: Saved, target: str, tmp_path: Path) -> None:
    check_same(corpus, saved, SOURCE, target, tmp_path)


def test_experts_that_processes_share_are_all_saved(corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed writes the first replica's weights alone."""
    saved = save(corpus, tmp_path / "run", "expert 2")
    assert (saved.path / "part_of_rank_01_model_states.pt").exists()
    check_same(corpus, saved, "expert 2", "one", tmp_path / "again")


def test_experts_that_are_divided_by_width(corpus: Path, tmp_path: Path) -> None:
    """A process holds as many spans of a weight as it has experts."""
    keys = {"moe_expert_type": "grouped", "moe_losses": {"load_balance": 0.01}, "moe_tensor_parallel": "width"}
    saved = save(corpus, tmp_path / "run", "tensor 2", **keys)
    check_same(corpus, saved, "tensor 2", "expert 2, ZeRO 2", tmp_path / "again", **keys)


@pytest.mark.slow
@pytest.mark.parametrize("source", EVERY)
def test_every_layout_goes_on_in_six_others(corpus: Path, source: str, tmp_path: Path) -> None:
    saved = save(corpus, tmp_path / "run", source)
    for number, target in enumerate(random.Random(f"{SEED} {source}").sample(sorted(set(EVERY) - {source}), 6)):
        check_same(corpus, saved, source, target, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"pos_emb": "rpe"}, {"no_weight_tying": False}], ids=["a table of positions", "a tied head"])
@pytest.mark.parametrize(("source", "target"), [("pipe 2", "one"), ("one", "pipe 2"), ("pipe 2, ZeRO 1", "tensor 2")])
def test_weights_that_parts_of_the_model_share(corpus: Path, tmp_path: Path, source: str, target: str, keys: dict[str, Any]) -> None:
    saved = save(corpus, tmp_path / "run", source, **keys)
    check_same(corpus, saved, source, target, tmp_path / "again", **keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_model_weights(saved.path).state_dict.items()}
    config = tiny_config(values(corpus, **keys))
    model = build_model(config.model, config.moe, shapes["sequential.0.word_embeddings.weight"][0], seed=1)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [{"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, {"type": "Lion", "params": {"lr": 1e-4}}])
def test_other_optimizers(corpus: Path, tmp_path: Path, optimizer: dict[str, Any]) -> None:
    saved = save(corpus, tmp_path / "run", "data 2, ZeRO 1", optimizer=optimizer, min_lr=1e-5)
    for target in ("one", "data 2, ZeRO 3", "expert 2"):
        case = EVERY[target]
        keys = values(corpus, load=str(saved.path.parent), **case.keys, optimizer=optimizer, min_lr=1e-5)
        outcomes = run(case.processes, keys, again=tmp_path / target)
        assert outcomes[0].losses == pytest.approx(saved.outcomes[0].losses, abs=1e-5)
        assert same_sums(saved.path, tmp_path / target / "global_step3") > 30


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("data 2, ZeRO 1", "one"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [("one", "data 2, ZeRO 2"), ("data 2, ZeRO 3", "tensor 2")]),
    ],
)
def test_bfloat16_goes_on_with_the_same_float32_copies(corpus: Path, tmp_path: Path, source: str, target: str) -> None:
    saved = save(corpus, tmp_path / "run", source, precision="bfloat16")
    case = EVERY[target]
    outcomes = run(case.processes, values(corpus, load=str(saved.path.parent), precision="bfloat16", **case.keys), again=tmp_path / "again")
    assert outcomes[0].losses == pytest.approx(saved.outcomes[0].losses, abs=0.03)  # micro-batches are summed in another order, in 16 bits
    assert same_sums(saved.path, tmp_path / "again" / "global_step3") > 60


def test_another_number_format_goes_on_from_the_float32_copies(corpus: Path, tmp_path: Path) -> None:
    saved = save(corpus, tmp_path / "run", "data 2, ZeRO 2", precision="bfloat16")
    run(1, values(corpus, load=str(saved.path.parent)), again=tmp_path / "again")
    before, after = sums(saved.path), sums(tmp_path / "again" / "global_step3")
    for name, entry in before.items():
        assert (entry["dtype"], after[name]["dtype"]) == ("bfloat16", "float32")
        assert {key: after[name].get(key) for key in ("weight", "exp_avg", "exp_avg_sq")} == {
            "weight": entry["master"],
            "exp_avg": entry["exp_avg"],
            "exp_avg_sq": entry["exp_avg_sq"],
        }


def test_dropout_goes_on_alike_every_time_and_differs_between_replicas(corpus: Path, tmp_path: Path) -> None:
    saved = save(corpus, tmp_path / "run", "one")
    first, second = (run(2, values(corpus, load=str(saved.path.parent))) for _ in range(2))
    assert [outcome.random for outcome in first] == [outcome.random for outcome in second]
    assert first[0].random != first[1].random


def test_a_checkpoint_of_the_version_before_is_read(corpus: Path, tmp_path: Path) -> None:
    """It has no table of parts and no checksums of tensors."""
    saved = save(corpus, tmp_path / "run", "data 2, ZeRO 1")
    manifest = json.loads((saved.path / layout.MANIFEST).read_text())
    (saved.path / layout.DIVISION).unlink()
    del manifest["files"][layout.DIVISION], manifest[layout.TENSORS]
    (saved.path / layout.MANIFEST).write_text(json.dumps(manifest))
    outcomes = run(1, values(corpus, load=str(saved.path.parent)))
    assert outcomes[0].losses == pytest.approx(saved.outcomes[0].losses, abs=1e-5)


def damaged(path: Path, directory: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(path.parent, directory)
    return directory / path.name


def refusal(corpus: Path, path: Path) -> str:
    with pytest.raises(DistributedError) as caught:
        run(1, values(corpus, load=str(path.parent)))
    return str(caught.value).strip().splitlines()[-1]


def test_what_is_wrong_with_a_checkpoint_is_named(corpus: Path, saved: Saved, tmp_path: Path) -> None:
    file = next(file.name for file in saved.path.iterdir() if file.name.endswith("_states.pt"))
    missing = damaged(saved.path, tmp_path / "missing")
    (missing / file).unlink()
    assert f"{missing / file} is missing: expected" in refusal(corpus, missing)

    short = damaged(saved.path, tmp_path / "short")
    (short / file).write_bytes((short / file).read_bytes()[:-100])
    assert f"{short / file} is damaged: expected" in refusal(corpus, short)

    table = damaged(saved.path, tmp_path / "table")
    (table / layout.DIVISION).write_text("{}")
    assert f"{table / layout.DIVISION} is damaged: expected" in refusal(corpus, table)

    other = damaged(saved.path, tmp_path / "other")
    manifest = json.loads((other / layout.MANIFEST).read_text())
    name = "sequential.3.attention.dense.weight"
    right, wrong = manifest[layout.TENSORS][name]["exp_avg_sq"], "0123456789abcdef"
    manifest[layout.TENSORS][name]["exp_avg_sq"] = wrong
    (other / layout.MANIFEST).write_text(json.dumps(manifest))
    sentence = refusal(corpus, other)
    assert f"was not loaded as it was saved: exp_avg_sq of {name} has the checksum {right}, but {wrong} was saved" in sentence
