"""The backend that processes talk through, and what they tell the C library."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from megatron.training.process import choose_backend, keep_freed_memory
from tests.training.runs import run_values, train_losses


@pytest.mark.parametrize(
    ("cuda", "requested", "backend"), [(False, "nccl", "gloo"), (False, None, "gloo"), (True, None, "nccl"), (True, "gloo", "gloo")]
)
def test_backend(monkeypatch: pytest.MonkeyPatch, cuda: bool, requested: str | None, backend: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    assert choose_backend(requested) == backend


def test_keeping_memory_is_harmless_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_freed_memory()
    monkeypatch.setattr("sys.platform", "darwin")
    keep_freed_memory()


def test_zero_leaves_muon_uncompiled(corpus: Path, tmp_path: Path) -> None:
    """Compiling it loads torch's compiler, which takes seconds."""
    train_losses(run_values(corpus, None, train_iters=1, eval_iters=0, zero_optimization={"stage": 1}, metrics_file=str(tmp_path / "m.jsonl")))
    muon = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    assert not hasattr(muon.muon_update, "_torchdynamo_orig_callable")
