"""When a run evaluates, and what it says of each corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config.section import ConfigError
from megatron.config.training import TrainingConfig
from megatron.data.blend import corpus_names
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE, tiny_config
from megatron.training.evaluate import evaluates_after, evaluations_until
from tests.training.runs import losses_of, run_values, train_losses


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A corpus unlike the foxes: one letter, over and over."""
    with IndexedDatasetWriter(tmp_path / "letters", np.dtype("uint16")) as writer:
        for _ in range(40):
            writer.add(np.full(100, ord("z")))
    return tmp_path / "letters"


def values_of(corpus: Path, save: Path | None, **overrides: Any) -> dict[str, Any]:
    values = {key: value for key, value in run_values(corpus, save).items() if key in TINY_DENSE or not key.startswith(("moe_", "interm"))}
    return {**values, "train_iters": 4, "eval_interval": 100, "eval_iters": 3, **overrides}


def paths(corpus: Path, *valid: Path, **labels: Any) -> dict[str, Any]:
    found = {
        "data_path": None,
        "train_data_paths": [str(corpus)],
        "test_data_paths": [str(corpus)],
        "valid_data_paths": [str(path) for path in valid],
    }
    return {**found, **labels}


def test_each_validation_corpus_has_a_loss_of_its_own(corpus: Path, letters: Path, tmp_path: Path, capsys: Any) -> None:
    train_losses(values_of(corpus, tmp_path / "run", **paths(corpus, corpus, letters)))
    metrics = tmp_path / "run" / "metrics.jsonl"
    (whole,), (foxes,), (zs,) = (losses_of(metrics, f"validation/{part}lm_loss") for part in ("", "foxes/", "letters/"))
    assert foxes < zs, "it learned from one of them"
    assert whole == pytest.approx((foxes + zs) / 2, abs=1e-5), "equal weights: three sequences of each"
    assert losses_of(metrics, "validation/letters/lm_loss_ppl")[0] == pytest.approx(float(np.exp(zs)))
    assert "validation results at the end of training for val data of letters | lm_loss value" in capsys.readouterr().out
    assert not any("test/foxes" in line for line in metrics.read_text().splitlines()), "there is one test corpus"
    train_losses(values_of(corpus, tmp_path / "alone", **paths(corpus, letters)))
    assert losses_of(tmp_path / "alone" / "metrics.jsonl", "validation/lm_loss")[0] == pytest.approx(zs, abs=1e-3), "each of its sequences is alike"


def test_a_corpus_counts_its_own_labels(corpus: Path, letters: Path, tmp_path: Path) -> None:
    """The foxes count only a few tokens, so that the whole is nearer to the letters."""
    source = IndexedDataset(corpus)
    with IndexedDatasetWriter(tmp_path / "few", np.dtype("<i4")) as writer:
        for number in range(len(source)):
            tokens = source.get(number).astype(np.int32)
            writer.add(np.where(np.arange(len(tokens)) % 16 == 3, tokens, -100))
    few = str(tmp_path / "few")
    labels = {"train_label_data_paths": [few], "test_label_data_paths": [few], "valid_label_data_paths": [few, str(letters)]}
    with IndexedDatasetWriter(tmp_path / "signed", np.dtype("<i4")) as writer:
        for _ in range(40):
            writer.add(np.full(100, ord("z")))
    labels["valid_label_data_paths"][1] = str(tmp_path / "signed")
    train_losses(values_of(corpus, tmp_path / "run", **paths(corpus, corpus, letters, **labels)))
    metrics = tmp_path / "run" / "metrics.jsonl"
    (whole,), (foxes,), (zs,) = (losses_of(metrics, f"validation/{part}lm_loss") for part in ("", "foxes/", "letters/"))
    assert whole == pytest.approx((foxes + 16 * zs) / 17, rel=0.01)


def test_two_processes_report_the_losses_of_one(corpus: Path, letters: Path, tmp_path: Path) -> None:
    values = values_of(corpus, None, **paths(corpus, corpus, letters), train_iters=1, optimizer={"type": "SGD", "params": {"lr": 1e-3}})
    train_losses({**values, "train_micro_batch_size_per_gpu": 4, "metrics_file": str(tmp_path / "one.jsonl")})
    run_distributed(train_losses, 2, {**values, "metrics_file": str(tmp_path / "two.jsonl")}, backend=None)
    for part in ("", "foxes/", "letters/"):
        one, two = (losses_of(tmp_path / f"{name}.jsonl", f"validation/{part}lm_loss") for name in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-5)


def test_extra_evaluations_read_batches_of_their_own(corpus: Path, tmp_path: Path) -> None:
    """Before the first step, after steps 1 and 3, at the interval, at the end; resuming changes nothing."""
    values = values_of(corpus, tmp_path / "a", eval_interval=2, extra_eval_iters=[0, 1, 3], train_iters=5)
    train_losses(values)
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(record["iteration"], record["validation/lm_loss"]) for record in records if "validation/lm_loss" in record]
    assert [step for step, _ in evaluated] == [0, 1, 2, 3, 4, 5]
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    train_losses({**halves, "exit_interval": 2})
    train_losses(halves)
    assert losses_of(tmp_path / "b" / "metrics.jsonl", "validation/lm_loss") == [loss for _, loss in evaluated]


def test_evaluations_are_counted_once() -> None:
    config = TrainingConfig(train_iters=20, eval_interval=5, extra_eval_iters=[0, 3, 3, 5, 20])
    assert [step for step in range(21) if evaluates_after(config, step)] == [0, 3, 5, 10, 15, 20]
    assert [evaluations_until(config, step) for step in (0, 2, 3, 5, 20)] == [1, 1, 2, 3, 6]
    assert evaluations_until(TrainingConfig(eval_interval=5), 20) == 4


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="extra_eval_iters"):
        tiny_config(TINY_DENSE, extra_eval_iters=[-1])


def test_corpora_are_told_apart() -> None:
    assert corpus_names(["a/wiki", "b/code"]) == ["wiki", "code"]
    assert corpus_names(["a/text", "b/text", "c/code"]) == ["a/text", "b/text", "code"]
    assert corpus_names(["a/text", "a/text"]) == ["a/text (1)", "a/text (2)"]
