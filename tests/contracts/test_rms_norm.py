"""RMSNorm: every implementation that can run here, every edge; values and gradients against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.kernels.rms_norm import OP, _rms_norm, rms_norm
from megatron.testing.devices import DEVICES
from tests.contracts.comparing import check_that_threads_change_no_bit, draw, skip_unless_it_runs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BACKENDS = [implementation.name for implementation in OP.implementations()]
# shape of x, shape of the scale: no rows, one row, one dimension, dimensions around vectors and their fourfold, several scales
SHAPES = [
    ((0, 8), (8,)),
    ((5,), (5,)),
    ((4, 1), (1,)),
    ((3, 7), (7,)),
    ((2, 65, 33), (33,)),
    ((130, 64), (64,)),
    ((2, 9, 3, 20), (3, 20)),
    ((1, 515), (515,)),
]


def definition(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs("rms_norm", backend, device)
    inputs = draw(*shapes[0], dtype=dtype, device=device), draw(*shapes[1], dtype=dtype, device=device, seed=1)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    got, wanted = rms_norm(*inputs, 1e-5, backend=backend), definition(*wide, 1e-5)
    grad = draw(*shapes[0], dtype=dtype, device=device, seed=2).detach()
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    for g, w in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, wide, grad.double()), strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), w, rtol=2 * tolerance, atol=tolerance * max(1.0, float(w.abs().max()) if w.numel() else 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_are_rounded_before_and_after_the_scale(backend: str) -> None:
    """As NeoX does it, and as our models always did: bit for bit."""
    skip_unless_it_runs("rms_norm", backend)
    x, scale = draw(64, 96, dtype=torch.bfloat16), draw(96, dtype=torch.bfloat16, seed=1)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    differing = rms_norm(x, scale, 1e-5, backend=backend) != scale * normed.bfloat16()
    assert differing.float().mean() < 2e-3, "a sum in another order may move a number that lies between two"


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_mixed_formats(backend: str) -> None:
    skip_unless_it_runs("rms_norm", backend)
    x, scale = draw(6, 5, 4), draw(4, 2)[:, 0]
    strided = rms_norm(x.permute(1, 0, 2), scale, 1e-5, backend=backend)
    plain = rms_norm(x.permute(1, 0, 2).contiguous(), scale.contiguous(), 1e-5, backend=backend)
    torch.testing.assert_close(strided, plain)
    torch.testing.assert_close(torch.autograd.grad(strided.sum(), x, retain_graph=True), torch.autograd.grad(plain.sum(), x))
    mixed = rms_norm(draw(3, 4, dtype=torch.bfloat16), draw(4), 1e-5, backend=backend)
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_what_is_not_a_number(backend: str) -> None:
    skip_unless_it_runs("rms_norm", backend)
    x = torch.zeros(3, 20)
    x[1, 19], x[2] = torch.nan, 1e15
    y = rms_norm(x, torch.ones(20), 1e-5, backend=backend)
    assert torch.equal(y[0], torch.zeros(20))
    assert y[1].isnan().all()
    torch.testing.assert_close(y[2], torch.ones(20))


def test_the_number_of_threads_changes_no_bit() -> None:
    skip_unless_it_runs("rms_norm", "compiled")

    def compute() -> tuple[Tensor, ...]:
        x, scale = draw(333, 40), draw(40, seed=1)
        return torch.autograd.grad(rms_norm(x, scale, 1e-5, backend="compiled").square().sum(), (x, scale))

    check_that_threads_change_no_bit(compute, (1, 2, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_keeps_pytorch_rules(backend: str) -> None:
    skip_unless_it_runs("rms_norm", backend)
    torch.library.opcheck(_rms_norm.overload, (draw(3, 8), draw(8), 1e-5, backend))
    if backend == "reference":
        assert torch.autograd.gradcheck(
            lambda x, s: rms_norm(x, s, 1e-5, backend=backend), (draw(3, 5, dtype=torch.float64), draw(5, dtype=torch.float64))
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-5), r"a scale of the shape \(4,\) for x \(2, 3\)"),
        (lambda: rms_norm(torch.zeros(2, 3), torch.zeros(()), 1e-5), r"a scale of the shape \(\)"),
        (lambda: rms_norm(torch.zeros(3), torch.zeros(2, 3), 1e-5), r"must have the shape of x's last dimensions"),
        (lambda: rms_norm(torch.zeros(2, 0), torch.zeros(0), 1e-5), r"a scale of the shape \(0,\)"),
        (lambda: rms_norm(torch.zeros(2, 3).int(), torch.zeros(3), 1e-5), "x is torch.int32 on cpu"),
        (lambda: rms_norm(torch.zeros(2, 3), torch.zeros(3, device="meta"), 1e-5), "the scale torch.float32 on meta"),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
