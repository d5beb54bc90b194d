"""Where tokens are left out of the loss, a step's loss and gradient are the mean over those that count, however the batch is cut."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.checkpoint.weights import load_model_weights
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.model.gpt import build_model
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE, tiny_config
from megatron.training.labels import Labels, count_labels, look_ahead
from tests.training.runs import losses_of, run_values, train_losses

CUTS = {"8x1": (8, 1), "1x8": (1, 8), "2x4": (2, 4)}
"""Sequences of a micro-batch, and micro-batches of a step."""


@pytest.fixture
def write_labels(corpus: Path, tmp_path: Path) -> Callable[[Callable[[int, np.ndarray], np.ndarray]], Path]:
    """Writes labels for the fox corpus: a function of the document's number and its tokens."""

    def write(labels: Callable[[int, np.ndarray], np.ndarray]) -> Path:
        source = IndexedDataset(corpus)
        with IndexedDatasetWriter(tmp_path / "labels", np.dtype("<i4")) as writer:
            for number in range(len(source)):
                writer.add(labels(number, source.get(number).astype(np.int32)))
        return tmp_path / "labels"

    return write


def uneven(number: int, tokens: np.ndarray) -> np.ndarray:
    """Nothing counts in most documents, a few tokens in some, all in others."""
    kept = {0: len(tokens), 1: 7}.get(number % 5, 0)
    return np.where(np.arange(len(tokens)) < kept, tokens, -100)


def nothing(number: int, tokens: np.ndarray) -> np.ndarray:
    return np.full_like(tokens, -100)


def values(corpus: Path, labels: Path, save: Path, cut: tuple[int, int], **overrides: Any) -> dict[str, Any]:
    """A dense model on labelled data in fp32."""
    dense = {key: value for key, value in run_values(corpus, save).items() if key in TINY_DENSE or not key.startswith(("moe_", "intermediate"))}
    paths = {f"{part}_data_paths": [str(corpus)] for part in ("train", "valid", "test")}
    paths |= {f"{part}_label_data_paths": [str(labels)] for part in ("train", "valid", "test")}
    batch = {"train_micro_batch_size_per_gpu": cut[0], "gradient_accumulation_steps": cut[1]}
    rest = {"data_path": None, "split": None, "train_iters": 3, "eval_iters": 2, "eval_interval": 2, "warmup": 0.0, "checkpoint_factor": 1}
    optimizer = {"type": "SGD", "params": {"lr": 0.5}}
    return {**dense, **paths, **batch, **rest, "optimizer": optimizer, **overrides}


def weights(save: Path, step: int) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_model_weights(save / f"global_step{step}").state_dict.items())])


def outcome(values: Mapping[str, Any]) -> tuple[list[float], list[float], Tensor]:
    """Losses of training and of validation, and the weights after the first step."""
    save = Path(str(values["save"]))
    return losses_of(save / "metrics.jsonl"), losses_of(save / "metrics.jsonl", "validation/lm_loss"), weights(save, 1)


def train_several(settings: list[dict[str, Any]]) -> None:
    """`train_losses` of each, one after the other: processes are slow to start."""
    for values in settings:
        train_losses(values)


def test_the_cut_of_a_batch_changes_nothing(corpus: Path, tmp_path: Path, write_labels: Callable[..., Path]) -> None:
    labels, zero = write_labels(uneven), {"zero_optimization": {"stage": 1}}
    alone = [values(corpus, labels, tmp_path / name, cut) for name, cut in CUTS.items()]
    alone.append(values(corpus, labels, tmp_path / "1x8, ZeRO 1", (1, 8), **zero))
    pair = [values(corpus, labels, tmp_path / "2x2 twice", (2, 2)), values(corpus, labels, tmp_path / "2x2 twice, ZeRO 1", (2, 2), **zero)]
    train_several(alone)
    run_distributed(train_several, 2, pair, backend=None)
    (losses, validation, after), *others = [outcome(settings) for settings in alone + pair]
    assert len(losses) == 3
    assert all(4 < loss < 7 for loss in losses + validation), "a mean over bytes, not diluted by micro-batches without any"
    assert len(others) == 5
    for other_losses, other_validation, other_after in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        assert other_validation == pytest.approx(validation, abs=1e-5)
        assert float((other_after - after).abs().max()) < 1e-6


def test_the_gradient_is_that_of_the_mean_over_what_counts(corpus: Path, tmp_path: Path, write_labels: Callable[..., Path]) -> None:
    """One step of plain SGD in four micro-batches, against PyTorch's own cross entropy on the batch as a whole."""
    settings = values(corpus, write_labels(uneven), tmp_path / "run", (2, 4), train_iters=1, gradient_clipping=0.0, weight_decay=0.0)
    train_losses({**settings, "extra_save_iters": [0]})
    batch = first_batch(settings, 8)
    config = tiny_config(settings)
    model = build_model(config.model, config.moe, 512, seed=1234)
    model.load_state_dict(load_model_weights(tmp_path / "run" / "global_step0").state_dict)
    logits = model(batch["text"][:, :-1]).logits_BSV
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["label"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    assert losses_of(tmp_path / "run" / "metrics.jsonl")[0] == pytest.approx(loss.item(), abs=1e-6)
    after = load_model_weights(tmp_path / "run" / "global_step1").state_dict
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name], parameter.detach() - 0.5 * parameter.grad, atol=1e-6, rtol=0)


def first_batch(settings: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """The first samples that a run of these settings learns from."""
    from megatron.config.training import resolve_batch
    from megatron.data.loader import batches, build_data
    from megatron.training.setup import plan_samples

    config = tiny_config(settings)
    plan = plan_samples(config.training, resolve_batch(config.training, 1))
    train = build_data(config.data, seq_length=config.model.seq_length, plan=plan, seed=config.training.seed).train
    assert train is not None
    return next(batches(train, micro_batch=size))


def test_a_key_keeps_gpt_neox_s_mean_of_means(corpus: Path, tmp_path: Path, write_labels: Callable[..., Path]) -> None:
    labels, losses = write_labels(uneven), {}
    for name, cut in {"whole": (8, 1), "cut": (1, 8)}.items():
        settings = values(corpus, labels, tmp_path / name, cut, calculate_per_token_loss=False, train_iters=1)
        losses[name] = train_losses(settings)[0]
    batch = first_batch(settings, 8)
    assert losses["whole"] > 4
    full = [bool((row >= 0).any()) for row in batch["label"][:, 1:]]
    assert losses["cut"] == pytest.approx(losses["whole"] * sum(full) / 8, rel=0.1), "sequences without labels count as losses of 0"


def test_unmasked_data_is_read_and_averaged_as_before() -> None:
    """Micro-batches are read one by one, nothing is counted, nothing divided otherwise."""
    read = []

    def stream() -> Any:
        for number in range(9):
            read.append(number)
            yield {"text": torch.arange(10)[None] + number}

    ahead, labels = look_ahead(stream(), 4, masked_token=None, device=torch.device("cpu"))
    assert (read, labels) == ([0], None)
    assert [int(next(ahead)["text"][0, 0]) for _ in range(3)] == [0, 1, 2]
    assert read == [0, 1, 2]


def test_what_counts_is_counted() -> None:
    text = torch.tensor([[5, 1, 2, 5, 3]])
    held = [{"text": text, "label": torch.tensor([[5, -100, 2, 5, -100]])}, {"text": text, "label": torch.full((1, 5), -100)}]
    device = torch.device("cpu")
    assert count_labels(held, masked_token=None, device=device) == Labels(2, 2, 1)
    assert count_labels(held, masked_token=1, device=device) == Labels(1, 2, 1)
    assert count_labels([{"text": text}], masked_token=5, device=device) == Labels(2, 1, 0)


def test_the_end_of_documents_is_left_out_the_same_way(corpus: Path, tmp_path: Path) -> None:
    """eod_mask_loss without label files: "o" ends documents, so that the counts of micro-batches differ."""
    found = []
    for name, cut in {"8x1": (8, 1), "1x8": (1, 8)}.items():
        settings = values(corpus, corpus, tmp_path / name, cut, eod_mask_loss=True)
        settings |= {f"{part}_label_data_paths": None for part in ("train", "valid", "test")}
        train_losses_with_eod(settings, ord("o"))
        found.append(outcome(settings))
    (losses, validation, after), (cut_losses, cut_validation, cut_after) = found
    assert cut_losses == pytest.approx(losses, abs=1e-5)
    assert cut_validation == pytest.approx(validation, abs=1e-5)
    assert float((cut_after - after).abs().max()) < 1e-6


def train_losses_with_eod(settings: Mapping[str, Any], token: int) -> None:
    """`train_losses` where the character tokenizer's end of documents is this token."""
    from megatron.data.tokenizer.character import CharLevelTokenizer

    before = CharLevelTokenizer.eod
    CharLevelTokenizer.eod = token  # type: ignore[assignment,misc]
    try:
        train_losses(settings)
    finally:
        CharLevelTokenizer.eod = before  # type: ignore[method-assign]


def test_a_batch_without_labels_is_skipped_and_said(corpus: Path, tmp_path: Path, write_labels: Callable[..., Path], capsys: Any) -> None:
    settings = values(corpus, write_labels(nothing), tmp_path / "run", (2, 4), extra_save_iters=[0], max_nonfinite_steps=2)
    train_losses(settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if "train/labels" in record] == [1, 2, 3]
    assert not any("lm_loss" in key for record in records for key in record), "a loss of nothing is no number"
    assert torch.equal(weights(tmp_path / "run", 3), weights(tmp_path / "run", 0))
    said = capsys.readouterr().out
    assert "Step 1: no token counts in the loss in 4 of its 4 micro-batches. There is nothing to learn from this step, so it changes nothing." in said
    assert "12 of 12 micro-batches of this run had no token that counts in the loss; 3 steps had none at all and changed nothing." in said
    assert "validation results at iteration 2: no token of the 8 micro-batches counts in the loss" in said
    assert "nan" not in said.replace("number of nan iterations:   0", "")


def test_some_micro_batches_without_labels_are_said_once(corpus: Path, tmp_path: Path, write_labels: Callable[..., Path], capsys: Any) -> None:
    train_losses(values(corpus, write_labels(uneven), tmp_path / "run", (1, 8), eval_iters=0))
    said = capsys.readouterr().out
    assert said.count("micro-batches. They add nothing to the step's loss") == 1


def test_a_log_line_over_several_steps_weighs_them_by_what_counts(
    corpus: Path, tmp_path: Path, write_labels: Callable[..., Path], capsys: Any
) -> None:
    settings = values(corpus, write_labels(uneven), tmp_path / "run", (1, 2), eval_iters=0, log_interval=3)
    train_losses(settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    taken = [(record["train/lm_loss"], record["train/labels"]) for record in records if "train/lm_loss" in record]
    mean = sum(loss * count for loss, count in taken) / sum(count for _, count in taken)
    assert math.isfinite(mean)
    assert f"lm_loss: {mean:.5E}"[:14] in capsys.readouterr().out


def test_auxiliary_losses_stay_means_over_micro_batches(corpus: Path, tmp_path: Path, write_labels: Callable[..., Path]) -> None:
    """Labels change nothing in what the balance loss adds in the first step."""
    balance = []
    for labels in (write_labels(uneven), None):
        moe = {key: value for key, value in run_values(corpus, None).items() if key.startswith(("moe_", "intermediate"))}
        settings = values(corpus, labels or corpus, tmp_path / str(labels is None), (2, 2), train_iters=1, eval_iters=0, **moe)
        if labels is None:
            settings |= {f"{part}_label_data_paths": None for part in ("train", "valid", "test")}
        train_losses(settings)
        balance += losses_of(Path(settings["save"]) / "metrics.jsonl", "train/load_balance")
    assert balance[0] == balance[1]
