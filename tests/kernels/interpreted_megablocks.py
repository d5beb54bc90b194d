"""Run by `test_megablocks.py` under TRITON_INTERPRET=1, with the sources of megablocks and stk on the path: their Python and Triton code on the CPU.

Three things of them need a GPU and are written down here: megablocks' compiled operations, the package grouped_gemm, and Triton's search for the
fastest block (`triton.autotune`). Everything else is the real package, and everything is compared with our reference.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.experts import OP, experts
from megatron.kernels.experts.interface import Choices, ExpertWeights
from megatron.model import choose_implementations
from megatron.model.gpt import GPT, build_model
from megatron.testing.tiny import tiny_config

TOLERANCE = 1e-4
EXPERTS, WIDTH, HIDDEN = 4, 40, 16


class FirstConfiguration:
    """In place of Triton's autotuner: the kernel with the first of its configurations."""

    def __init__(self, kernel: Any, blocks: dict[str, int]) -> None:
        self.kernel, self.blocks = kernel, blocks

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self.kernel[grid](*arguments, **named, **self.blocks)


def multiply(a: Tensor, b: Tensor, rows_E: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None) -> Tensor:
    """grouped_gemm's product: rows sorted by expert, and the counts of rows on the CPU. `trans_a`: a matrix for each expert."""
    assert rows_E.dtype == torch.int64
    assert rows_E.device.type == "cpu"
    assert rows_E.sum() == len(a)
    parts, counts = a.split(rows_E.tolist()), rows_E.tolist()
    if trans_a:
        result = torch.stack([x.T @ y for x, y in zip(parts, b.split(counts), strict=True)])
    else:
        result = torch.cat([x @ (w.T if trans_b else w) for x, w in zip(parts, b, strict=True)])
    return result if c is None else c.copy_(result)


class Multiply(torch.autograd.Function):
    """Its gradients, as `grouped_gemm.ops` has them."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rows_E: Tensor, trans_b: bool) -> Tensor:
        ctx.save_for_backward(a, b, rows_E)
        ctx.trans_b = trans_b
        return multiply(a, b, rows_E, trans_b=trans_b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, rows_E = ctx.saved_tensors
        left, right = (grad, a) if ctx.trans_b else (a, grad)
        return multiply(grad, b, rows_E, trans_b=not ctx.trans_b), multiply(left, right, rows_E, trans_a=True), None, None


def sort(x: Tensor, end_bit: int, x_out: Tensor, indices_out: Tensor) -> None:
    """Radix sort: stable, and only the lowest `end_bit` bits count."""
    assert x.dtype == torch.int32
    assert int(x.max()) < 2**end_bit
    values, order = torch.sort(x, stable=True)
    x_out.copy_(values)
    indices_out.copy_(order)


@pytest.fixture(autouse=True, scope="module")
def replaced() -> None:
    """Before megablocks is imported for the first time."""
    assert importlib.util.find_spec("megablocks") is not None
    triton.autotune = lambda configs, key: lambda kernel: FirstConfiguration(kernel, configs[0].kwargs)
    compiled, products = types.ModuleType("megablocks_ops"), types.ModuleType("grouped_gemm")
    vars(compiled).update(
        sort=sort,
        histogram=lambda x, bins: torch.bincount(x, minlength=bins).to(torch.int32),
        inclusive_cumsum=lambda x, dim, out: out.copy_(x.cumsum(dim)),
    )
    gradients: Callable[..., Tensor] = lambda a, b, rows_E, trans_b=False: Multiply.apply(a, b, rows_E, trans_b)  # noqa: E731
    vars(products).update(backend=types.SimpleNamespace(gmm=multiply), ops=types.SimpleNamespace(gmm=gradients))
    sys.modules.update(megablocks_ops=compiled, grouped_gemm=products)
    known = OP._known["megablocks"]
    OP._known["megablocks"] = dataclasses.replace(known, devices=frozenset({"cpu"}), unavailable=lambda: None)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def choices_of(tokens: int, top_k: int, spread: str) -> Tensor:
    """int64 expert_TK, different ones for each token."""
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(5))
    if spread == "an expert without rows":
        scores[:, 1] = -1
    return torch.zeros(tokens, 1, dtype=torch.int64) if spread == "all on one" else scores.topk(top_k).indices


def results(backend: str, inputs: list[Tensor], expert_TK: Tensor, activation: str) -> list[Tensor]:
    """The output and the gradients of everything."""
    x, weight_TK, up, down, *gate = inputs
    y = experts(x, Choices(expert_TK, weight_TK), ExpertWeights(up, gate[0] if gate else None, down), activation=activation, backend=backend)
    grad = draw(*y.shape, seed=9).detach()
    return [y, *torch.autograd.grad(y, inputs, grad, allow_unused=not len(x), materialize_grads=not len(x))]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("tokens", "top_k", "spread"),
    [(37, 2, "even"), (9, 1, "even"), (5, 3, "an expert without rows"), (7, 1, "all on one"), (1, 2, "even"), (0, 2, "even")],
)
def test_same_results_as_ours(tokens: int, top_k: int, spread: str, gated: bool) -> None:
    expert_TK = choices_of(tokens, top_k, spread)
    inputs = [draw(tokens, HIDDEN, seed=1), draw(*expert_TK.shape, seed=2), *(draw(EXPERTS, WIDTH, HIDDEN, seed=3 + n) for n in range(2 + gated))]
    for got, wanted in zip(*(results(backend, inputs, expert_TK, "silu") for backend in ("megablocks", "reference")), strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, gated: bool) -> None:
    expert_TK = choices_of(6, 2, "even")
    inputs = [draw(6, HIDDEN, seed=1), draw(6, 2, seed=2), *(draw(EXPERTS, WIDTH, HIDDEN, seed=3 + n) for n in range(2 + gated))]
    for got, wanted in zip(*(results(backend, inputs, expert_TK, activation) for backend in ("megablocks", "reference")), strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def model(backend: str, **keys: Any) -> GPT:
    config = tiny_config(moe_num_experts=4, moe_top_k=2, precision="bfloat16", kernel_backends={"experts": backend}, **keys)
    gpt = build_model(config.model, config.moe, 64, seed=1)
    choose_implementations(config.model, config.moe, gpt)
    return gpt


@pytest.mark.parametrize("keys", [{"activation": "gelu"}, {"activation": "swiglu"}, {"moe_router_type": "sigmoid"}], ids=str)
def test_a_model_computes_the_same(keys: dict[str, Any]) -> None:
    """Logits, load of the experts, losses, and the gradient of every parameter."""
    keys = {"moe_router_type": "topk", "moe_losses": {"load_balance": 0.01}, **keys}
    text, found = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2)), []
    for backend in ("megablocks", "auto"):
        gpt = model(backend, **keys)
        loss = gpt(text, labels_BS=text).loss
        found.append([loss, *torch.autograd.grad(loss, list(gpt.parameters()), allow_unused=True, materialize_grads=True)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)
