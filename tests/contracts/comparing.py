"""What the contract tests of all ops share: which implementations run here, and the comparison with a definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.kernels.backends import OPS
from megatron.kernels.registry import Op


def implementations(op: str) -> list[Any]:
    return [pytest.param(implementation.name, id=f"{op}-{implementation.name}") for implementation in OPS[op].implementations()]


def skip_unless_it_runs(op: str | Op[Any], backend: str, device: str = "cpu") -> None:
    chosen = OPS[op] if isinstance(op, str) else op
    reason = chosen.status(device)[backend]
    if reason is not None:
        pytest.skip(f"{chosen.name} {backend} on {device}: {reason}")


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


NANS = [0x7FC00000, -1, 0x7FC00155]
"""Bits of float32 numbers that are none: what processors make, what memory full of ones holds, and one with a message in its last bits."""


def nan_of(bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def check(
    ours: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: tuple[Tensor, ...], tolerances: Mapping[torch.dtype, float]
) -> None:
    """Same values and gradients; the definition is computed in float64."""
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    got, wanted = ours(*inputs), definition(*wide)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(wanted.device)
    tolerance = tolerances[got.dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    for g, w in zip(torch.autograd.grad(got, inputs, grad.to(got.dtype)), torch.autograd.grad(wanted, wide, grad), strict=True):
        assert g.dtype == got.dtype
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=4 * tolerance)


def check_that_threads_change_no_bit(compute: Callable[[], Sequence[Tensor]], numbers: Sequence[int]) -> None:
    """`compute` gives the same tensors with each of these numbers of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in numbers:
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
