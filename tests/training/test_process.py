"""The backend that processes talk through, and what they tell the C library."""

from __future__ import annotations

import pytest

from megatron.training.process import choose_backend, keep_freed_memory


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
