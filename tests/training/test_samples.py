"""Runs on labelled, whole and repeated documents: what counts in the loss, how long a run is, and that resuming changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.data.indexed import DatasetError, IndexedDataset, IndexedDatasetWriter
from megatron.data.loader import SamplePlan, batches, build_data
from megatron.data.sample import map_cache
from megatron.model.gpt import GPTOutput, build_model
from megatron.mpu.topology import current_topology
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import tiny_config
from megatron.training.setup import after_the_first
from megatron.training.step import forward
from tests.training.runs import losses_of, run_values, train_losses

SUBSETS = ("train", "valid", "test")
PIPE = ord(" ")


@pytest.fixture
def label_file(corpus: Path, tmp_path: Path) -> Callable[[Callable[[np.ndarray], np.ndarray]], Path]:
    """The corpus' tokens, and -100 where the given function of a document's tokens is true."""

    def write(masked: Callable[[np.ndarray], np.ndarray]) -> Path:
        file = IndexedDataset(corpus)
        with IndexedDatasetWriter(tmp_path / "labels", np.dtype("<i4")) as writer:
            for number in range(len(file)):
                tokens = file.get(number).astype(np.int32)
                writer.add(np.where(masked(tokens), -100, tokens))
        return tmp_path / "labels"

    return write


def values_with_paths(corpus: Path, save: Path | None, labels: Path | None = None, **overrides: Any) -> dict[str, Any]:
    paths: dict[str, Any] = {f"{name}_data_paths": [str(corpus)] for name in SUBSETS}
    if labels is not None:
        paths |= {f"{name}_label_data_paths": [str(labels)] for name in SUBSETS}
    return {**run_values(corpus, save), "data_path": None, **paths, **overrides}


class OneProcess:
    """What `forward` needs of an engine."""

    def __init__(self, **keys: Any) -> None:
        config = tiny_config(**keys)
        self.device = torch.device("cpu")
        self.model = build_model(config.model, config.moe, 128, seed=1)
        self.model.separate_documents(attention=config.data.reset_attention_mask, positions=config.data.reset_position_ids)

    def __call__(self, tokens_BS: Tensor, **arguments: Any) -> GPTOutput:
        return self.model(tokens_BS, **arguments)


def test_the_loss_is_the_mean_over_what_counts() -> None:
    """As in NeoX: sum(loss * mask) / sum(mask) of a micro-batch, where a negative label masks its own place and the end of a document the next."""
    text = torch.arange(34).reshape(2, 17) % 20
    label = torch.where(text % 3 == 0, -100, text)
    output = forward(OneProcess(), {"text": text, "label": label}, masked_token=4)
    plain = forward(OneProcess(), {"text": text}, masked_token=None)
    assert plain.token_loss_BS is not None
    counts = (text[:, 1:] % 3 != 0) & (text[:, :-1] != 4)
    assert output.lm_loss.item() == pytest.approx(float(plain.token_loss_BS[counts].mean()), abs=1e-6)  # type: ignore[union-attr]
    assert plain.lm_loss.item() == pytest.approx(float(plain.token_loss_BS.mean()), abs=1e-6)  # type: ignore[union-attr]


def test_a_batch_in_which_nothing_counts_has_no_loss() -> None:
    text = torch.arange(17)[None]
    assert forward(OneProcess(), {"text": text, "label": torch.full_like(text, -100)}, masked_token=None).lm_loss == 0.0


@pytest.mark.parametrize("pos_emb", ["rotary", "learned"])
def test_a_document_in_a_sample_is_predicted_as_if_it_were_alone(corpus: Path, pos_emb: str) -> None:
    """From the file through packing and the model: what stands before a document in its sample leaves no trace."""
    keys = {"pos_emb": pos_emb, "seq_length": 250, "max_position_embeddings": 250, "reset_attention_mask": True, "reset_position_ids": True}
    config = tiny_config(**keys, data_path=str(corpus), split="1")
    plan = SamplePlan(train_samples=20, valid_samples=0, test_samples=0)
    dataset = build_data(config.data, seq_length=250, plan=plan, seed=1).train
    engine, plain = OneProcess(**keys), OneProcess(pos_emb=pos_emb, max_position_embeddings=250)
    batch = next(batches(dataset, micro_batch=4))  # type: ignore[arg-type]
    together = forward(engine, batch, masked_token=None).token_loss_BS
    assert together is not None
    compared = 0
    for text, document, loss in zip(batch["text"], batch["document"], together, strict=True):
        for number in document.unique():
            (places,) = torch.nonzero(document == number, as_tuple=True)
            if len(places) > 1:
                alone = forward(plain, {"text": text[places][None]}, masked_token=None).token_loss_BS
                torch.testing.assert_close(loss[places[:-1]], alone[0], rtol=1e-4, atol=1e-5)  # type: ignore[index]
                compared += 1
    assert compared > len(batch["text"])


def test_a_run_on_documents_kept_apart_resumes_exactly(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "a", seq_length=200, max_position_embeddings=200)
    plain = train_losses({**values, "save": None, "checkpoint_factor": None, "metrics_file": str(tmp_path / "m.jsonl")})
    values |= {"reset_attention_mask": True, "reset_position_ids": True}
    apart, evaluated = train_losses(values), losses_of(tmp_path / "a/metrics.jsonl", "validation/lm_loss")
    assert apart != plain
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    train_losses({**halves, "exit_interval": 5})
    assert train_losses(halves) == apart
    assert losses_of(tmp_path / "b/metrics.jsonl", "validation/lm_loss") == evaluated


def test_labels_that_mask_nothing_change_nothing(corpus: Path, tmp_path: Path, label_file: Callable[..., Path]) -> None:
    plain = train_losses(values_with_paths(corpus, tmp_path / "plain"))
    labels = label_file(lambda tokens: np.zeros(len(tokens), bool))
    assert train_losses(values_with_paths(corpus, tmp_path / "labelled", labels)) == plain


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_resuming_on_masked_labels_changes_nothing(corpus: Path, tmp_path: Path, label_file: Callable[..., Path], pack_impl: str) -> None:
    labels = label_file(lambda tokens: tokens == PIPE)
    settings = {"pack_impl": pack_impl, "seq_length": 200, "max_position_embeddings": 200, "eod_mask_loss": True}
    values = values_with_paths(corpus, tmp_path / "a", labels, **settings)
    straight, evaluated = train_losses(values), losses_of(tmp_path / "a/metrics.jsonl", "validation/lm_loss")
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    assert [*train_losses({**halves, "exit_interval": 5})] == straight[:5]
    assert train_losses(halves) == straight
    assert losses_of(tmp_path / "b/metrics.jsonl", "validation/lm_loss") == evaluated
    unmasked = train_losses({**values_with_paths(corpus, None, **{**settings, "pack_impl": "packed"}), "metrics_file": str(tmp_path / "m.jsonl")})
    assert unmasked != straight


def test_epochs_give_the_steps_and_the_schedule(corpus: Path, tmp_path: Path) -> None:
    """(tokens - 1) // 128 samples, one fewer used, two a micro-batch, three micro-batches a step."""
    model = {"seq_length": 128, "max_position_embeddings": 128, "min_lr": 0.0}
    length = {"train_iters": None, "train_epochs": 2, "gradient_accumulation_steps": 3, "eval_iters": 0}
    tokens = int(IndexedDataset(corpus).sizes[:48].sum())
    steps = ((tokens - 1) // 128 - 1) // 2 * 2 // 3
    values = run_values(corpus, tmp_path / "run", **model, **length, checkpoint_factor=100)
    epochs = train_losses(values)
    assert len(epochs) == steps
    by_steps = train_losses({**values, "train_epochs": None, "train_iters": steps, "save": str(tmp_path / "steps")})
    rates = [losses_of(tmp_path / name / "metrics.jsonl", "train/learning_rate") for name in ("run", "steps")]
    assert rates[0] == rates[1]
    assert 0 < rates[0][-1] < rates[0][0] / 100
    assert by_steps != epochs, "one epoch twice, not two epochs shuffled together"
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    train_losses({**halves, "exit_interval": steps - 4})
    assert train_losses(halves) == epochs


def test_an_epoch_shorter_than_a_step_is_explained(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"train_epochs: 1 epoch\(s\) of \d+ training samples are less than one step of 4,000 samples"):
        train_losses(run_values(corpus, tmp_path / "run", train_iters=None, train_epochs=1, eval_iters=0, gradient_accumulation_steps=2000))


def count_builds(corpus: Path) -> list[int]:
    """How many index maps this process builds rather than finds, with a shared file system and without."""
    built = [0, 0]
    original, file = map_cache.build, IndexedDataset(corpus)
    for number, shared in enumerate((True, False)):

        def build(*args: Any, number: int = number, **settings: Any) -> Any:
            built[number] += 1
            return original(*args, **settings)

        map_cache.build = build
        try:
            after_the_first(
                lambda seed=number: map_cache.load_or_build(file, range(60), seq_length=16, num_samples=10, seed=seed),  # type: ignore[misc]
                current_topology(),
                shared=shared,
            )
        finally:
            map_cache.build = original
    return built


def test_one_process_builds_and_the_others_read(corpus: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"foxes{suffix}").write_bytes(corpus.with_name(corpus.name + suffix).read_bytes())
    assert run_distributed(count_builds, 2, tmp_path / "foxes") == [[1, 1], [0, 0]]


def fail_or_pass(corpus: Path) -> str:
    topology = current_topology()

    def build() -> Any:
        raise DatasetError(f"process {topology.rank}")

    try:
        after_the_first(build, topology, shared=True)
    except DatasetError as error:
        return str(error)
    return ""


def test_a_mistake_in_the_data_is_an_error_on_every_process(corpus: Path) -> None:
    """None waits for one that has failed."""
    assert run_distributed(fail_or_pass, 2, corpus) == ["process 0", "process 1"]
