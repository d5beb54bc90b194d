"""What a process assumes when no launcher told it anything."""

from __future__ import annotations

import pytest

from megatron.training.process import choose_backend, keep_freed_memory, single_process_defaults


def test_a_process_alone_is_rank_0_of_1() -> None:
    environment: dict[str, str] = {}
    single_process_defaults(environment)
    assert {key: environment[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert 1024 <= int(environment["MASTER_PORT"]) < 65536


def test_what_a_launcher_said_stays() -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    given = dict(environment)
    single_process_defaults(environment)
    assert environment == {**given, "LOCAL_WORLD_SIZE": "2"}


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
