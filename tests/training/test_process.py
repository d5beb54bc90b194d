"""The backend that processes talk through, and what they tell the C library."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

from megatron.training.process import TOLD, choose_backend, keep_freed_memory, return_freed_memory, told_later
from tests.training.runs import outer_environment, run_values, train_losses


@pytest.mark.parametrize(
    ("cuda", "requested", "backend"), [(False, "nccl", "gloo"), (False, None, "gloo"), (True, None, "nccl"), (True, "gloo", "gloo")]
)
def test_backend(monkeypatch: pytest.MonkeyPatch, cuda: bool, requested: str | None, backend: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    assert choose_backend(requested) == backend


def test_keeping_memory_is_harmless_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in (sys.platform, "darwin"):
        monkeypatch.setattr("sys.platform", platform)
        keep_freed_memory()
        return_freed_memory()


def test_zero_leaves_muon_uncompiled(corpus: Path, tmp_path: Path) -> None:
    """Compiling it loads torch's compiler, which takes seconds."""
    train_losses(run_values(corpus, None, train_iters=1, eval_iters=0, zero_optimization={"stage": 1}, metrics_file=str(tmp_path / "m.jsonl")))
    muon = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    assert not hasattr(muon.muon_update, "_torchdynamo_orig_callable")


def test_a_run_loads_neither_the_compiler_nor_triton(corpus: Path, tmp_path: Path) -> None:
    """PyTorch and DeepSpeed would load both only to leave them unused: 140 MiB and a second in every process."""
    values = run_values(corpus, tmp_path / "run", train_iters=2, eval_iters=1, metrics_file=str(tmp_path / "m.jsonl"))
    program = f"""
        import sys
        from megatron.training.process import choose_accelerator
        choose_accelerator()
        from tests.training.runs import train_losses
        train_losses({values!r})
        print(sorted({{"torch._dynamo", "triton"}} & set(sys.modules)))
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True, env=outer_environment())
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "[]"


def test_the_compiler_is_told_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def zero_grad(number: int) -> int:
        return number + 1

    told: list[Any] = []
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    monkeypatch.setattr(zero_grad, TOLD, told_later(zero_grad), raising=False)
    assert getattr(zero_grad, TOLD)(1) == 2
    compiler = types.SimpleNamespace(disable=lambda function, wrapping: told.append((function, wrapping)) or (lambda number: number + 10))
    monkeypatch.setitem(sys.modules, "torch._dynamo", compiler)
    assert getattr(zero_grad, TOLD)(1) == 11
    assert getattr(zero_grad, TOLD)(1) == 11
    assert told == [(zero_grad, False)]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    program = """
        import torch
        from megatron.training.process import keep_freed_memory, return_freed_memory

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

        keep_freed_memory()
        before = resident()
        blocks = [torch.ones(2**18) for _ in range(100)]
        last = torch.ones(2**18)
        del blocks
        kept = resident()
        return_freed_memory()
        print(kept - before, resident() - before)
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True, text=True)
    kept, returned = map(int, finished.stdout.split())
    assert kept >= 95
    assert returned < 30
