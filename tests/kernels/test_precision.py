"""Products of 16-bit matrices on a processor without 16-bit instructions: computed in float32, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron.kernels import precision
from megatron.kernels.precision import float32_linear, linear, product_dtype

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor that lacks 16-bit instructions, and one that has them."""
    monkeypatch.setattr(precision, "_emulated", lambda dtype: request.param and dtype in DTYPES)
    return bool(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_a_cpu_without_the_instructions_widens(dtype: torch.dtype, emulated: bool) -> None:
    assert product_dtype(dtype, torch.device("cpu")) == (torch.float32 if emulated else dtype)
    assert product_dtype(dtype, torch.device("cuda")) == dtype
    assert product_dtype(torch.float64, torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_exact_product_rounded_once(dtype: torch.dtype, bias: bool, emulated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 8), (5, 8), (5,)][: 3 if bias else 2]
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    grad = torch.randn(2, 3, 5, generator=generator).to(dtype)
    y, wanted = linear(*inputs), functional.linear(*exact)
    tolerance = torch.finfo(dtype).eps * (1 if emulated else 4)
    for got, want in zip([y, *gradients(y, inputs, grad)], [wanted, *gradients(wanted, exact, grad.double())], strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_no_gradient_is_computed_for_a_frozen_weight(emulated: bool) -> None:
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True), torch.ones(3, 4, dtype=torch.bfloat16)
    linear(x, weight).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 4), 3, dtype=torch.bfloat16))  # type: ignore[arg-type]
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32, torch.float64], ids=str)
def test_a_float32_product_keeps_its_rows_as_they_are(dtype: torch.dtype) -> None:
    generator, wide = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((2, 3, 8), (5, 8))]
    exact = [t.detach().to(wide).requires_grad_() for t in inputs]
    grad, kept = torch.randn(2, 3, 5, generator=generator).to(wide), list[torch.dtype]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = float32_linear(*inputs)
    wanted = functional.linear(*exact)
    assert set(kept) == {dtype}
    assert torch.equal(y, wanted)
    for got, want in zip(gradients(y, inputs, grad), gradients(wanted, exact, grad), strict=True):
        torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def gradients(y: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, grad)
