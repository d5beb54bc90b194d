"""MegaBlocks as an implementation of the expert layer: its own layers on the CPU, what they cannot do, and what is missing where it is not there.

`requirements/install.sh dev` downloads the sources of the package (65 KB); nothing of them is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import ConfigError
from megatron.kernels import triton_kernels
from megatron.kernels.experts import OP, experts, experts_of_rows, megablocks
from megatron.kernels.experts.interface import Choices, ExpertWeights
from megatron.kernels.experts.megablocks import unavailable
from megatron.launcher.implementations import implementations
from megatron.testing.tiny import tiny_config

SOURCES = Path(sys.prefix, "sources")
PACKAGES = [SOURCES / "megablocks-0.10.0", SOURCES / "stanford_stk-0.7.1"]
EXPERTS = {"moe_num_experts": 4, "moe_router_type": "topk", "precision": "bfloat16", "kernel_backends": {"experts": "megablocks"}}


needs_triton = pytest.mark.skipif(triton_kernels.unavailable() is not None, reason=str(triton_kernels.unavailable()))
needs_sources = pytest.mark.skipif(
    not all(map(Path.is_dir, PACKAGES)), reason="the sources of megablocks are not here; 'requirements/install.sh dev' downloads them"
)


def run(repository: Path, chosen: str) -> str:
    """The last line of pytest's output."""
    path = os.pathsep.join(map(str, (repository, *PACKAGES)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
    file = Path("tests", "kernels", "interpreted_megablocks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", os.fspath(file), "-k", chosen]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout[-6000:]
    return finished.stdout.strip().splitlines()[-1]


@needs_triton
@needs_sources
def test_an_expert_without_rows(repository: Path) -> None:
    last = run(repository, "rows")
    assert "8 passed" in last, last


@needs_triton
@needs_sources
def test_two_processes_divide_the_experts(repository: Path) -> None:
    last = run(repository, "divide")
    assert "1 passed" in last, last


@needs_triton
@needs_sources
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_own_layers_compute_what_ours_do(repository: Path) -> None:
    last = run(repository, "test")
    assert "38 passed" in last, last


@pytest.mark.parametrize(
    ("version", "missing", "reason"),
    [
        (None, (), "the package megablocks is not installed"),
        ("0.7.0", (), "megablocks 0.7.0 is installed, and 0.10 or newer is needed"),
        ("0.10.0", ("megablocks_ops", "grouped_gemm"), "megablocks is installed without megablocks_ops and grouped_gemm; install it with"),
        ("0.10.0", (), "None"),
    ],
)
def test_what_is_missing_is_said(version: str | None, missing: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(megablocks, "version", installed)
    monkeypatch.setattr(megablocks, "find_spec", lambda name: None if name in missing else object())
    assert str(unavailable()).startswith(reason)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"precision": "fp32"}, "computes in bfloat16 only, and precision is fp32; write precision: bfloat16"),
        ({"moe_ffn_hidden_size": 31}, "needs 128 columns in all experts; 4 experts of width 31 are fewer"),
        ({"moe_expert_type": "structmoe"}, "computes moe_expert_type: grouped only, and it is structmoe"),
        ({"moe_expert_bias": True}, "computes experts without biases only"),
        ({"moe_router_type": "top_p"}, "needs the same number of experts for every token, and moe_router_type top_p chooses it by token"),
        ({"moe_router_type": "expert_choice"}, "moe_router_type expert_choice chooses it by token"),
    ],
)
def test_what_it_cannot_do_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{**EXPERTS, **keys})


def test_a_library_for_the_whole_layer_leaves_nothing_to_the_single_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.kernels.experts.OP.check_name", lambda name: None)
    monkeypatch.setattr("megatron.kernels.experts.OP.choose", lambda requested, device: requested)
    parts = [choice.part for choice in implementations(tiny_config(**EXPERTS), "cpu")]
    assert parts == ["attention", "linear_cross_entropy", "experts", "route", "optimizer"]


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_on_a_gpu(gated: bool) -> None:
    """Whole layers, and rows that are sorted already, of which one expert has none."""
    if (reason := OP.status("cuda")["megablocks"]) is not None:
        pytest.skip(f"megablocks: {reason}")
    draws = torch.Generator().manual_seed(1)
    x, *matrices = (torch.randn(*shape, generator=draws).cuda() for shape in ((96, 64), *((4, 128, 64),) * (2 + gated)))
    rows_E, expert_TK, weight_TK = torch.tensor([40, 0, 24, 32]).cuda(), torch.randint(4, (96, 1)).cuda(), torch.rand(96, 1).cuda()
    for whole in (True, False):
        found = []
        for backend, dtype in (("megablocks", torch.bfloat16), ("reference", torch.float64)):
            given = [t.to(dtype).requires_grad_() for t in (x, *matrices)]
            weights = ExpertWeights(given[1], given[3] if gated else None, given[2])
            if whole:
                y = experts(given[0], Choices(expert_TK, weight_TK.to(dtype)), weights, activation="silu", backend=backend)
            else:
                y = experts_of_rows(given[0], rows_E, weights, activation="silu", backend=backend)
            found.append([y, *torch.autograd.grad(y, given, torch.ones_like(y))])
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=5e-2, atol=3e-2 * wanted.abs().max().item())
