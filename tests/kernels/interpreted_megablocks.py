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
from megatron.kernels.experts import OP, experts, experts_of_rows
from megatron.kernels.experts.interface import Choices, ExpertWeights
from megatron.model import choose_implementations
from megatron.model.divide import Divider
from megatron.model.gpt import GPT, build_model
from megatron.model.initialization import build_initializer
from megatron.model.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron.model.moe.dispatch.transport import ExpertShare
from megatron.model.moe.experts.grouped import GroupedExperts
from megatron.model.moe.routing import Routing
from megatron.mpu.groups import Groups, make_groups
from megatron.mpu.topology import Layout, current_topology
from megatron.testing.distributed import run_distributed
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
    replace_parts()


def replace_parts() -> None:
    """Before megablocks is imported for the first time, in every process."""
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


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [[5, 0, 1, 7], [0, 0, 0, 4], [0, 0, 0, 0]], ids=str)
def test_rows_that_are_sorted_already(counts: list[int], gated: bool) -> None:
    inputs = [draw(sum(counts), HIDDEN, seed=1), *(draw(EXPERTS, WIDTH, HIDDEN, seed=3 + n) for n in range(2 + gated))]
    found = []
    for backend in ("megablocks", "reference"):
        x, up, down, *gate = inputs
        weights = ExpertWeights(up, gate[0] if gate else None, down)
        y = experts_of_rows(x, torch.tensor(counts), weights, activation="silu", backend=backend)
        found.append([y, *torch.autograd.grad(y, inputs, draw(*y.shape, seed=9).detach())])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def model(backend: str, divider: Divider | None = None, **keys: Any) -> GPT:
    config = tiny_config(moe_num_experts=4, moe_top_k=2, precision="bfloat16", kernel_backends={"experts": backend}, **keys)
    gpt = build_model(config.model, config.moe, 64, seed=1, divider=divider)
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


CHOICES = {
    "nothing for the second process": torch.tensor([[0, 1]] * 6),
    "nothing from the second process": torch.tensor([[0, 1], [3, 2], [3, 1], [2, 0], [0, 3], [1, 3]]),
    "uneven": torch.tensor([[0, 3], [3, 2], [3, 1], [3, 0], [0, 3], [1, 3]]),
}


def divided(backend: str, groups: Groups, chosen: str, activation: str) -> list[Tensor]:
    """The output of this process's tokens, and the gradients of tokens, weights and its experts."""
    config = tiny_config(moe_num_experts=EXPERTS, moe_top_k=2, precision="bfloat16", activation=activation, kernel_backends={"experts": backend})
    experts_here = GroupedExperts(config.model, config.moe, build_initializer(config.model, 1))
    share, rank = ExpertShare(EXPERTS, groups.expert, groups.tensor), groups.expert.rank
    for parameter in experts_here.parameters():
        rows = parameter.shape[0] // EXPERTS
        parameter.data = parameter.data[share.first * rows : (share.first + share.here) * rows].clone()
    experts_here.num_experts = experts_here.mlp.num_experts = share.here
    tokens = 0 if rank == 1 and chosen == "nothing from the second process" else 6 - rank
    x_TD, weight_TK = draw(tokens, config.model.hidden_size, seed=1 + rank), draw(tokens, 2, seed=3 + rank)
    routing = Routing(CHOICES[chosen][:tokens], weight_TK * 1, torch.zeros(0), torch.zeros(0))
    y_TD = AllToAllDispatcher(config.moe, share).run(x_TD * 1, routing, experts_here).y_TD
    y_TD.backward(draw(*y_TD.shape, seed=9).detach())
    gradients = [tensor.grad for tensor in (x_TD, weight_TK, *experts_here.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [y_TD.detach(), *(gradient for gradient in gradients if gradient is not None)]


def compared() -> None:
    """Experts of two processes, and a model of theirs."""
    replace_parts()
    groups = make_groups(current_topology(Layout(expert=2)))
    for chosen in CHOICES:
        for activation in ("gelu", "swiglu"):
            for got, wanted in zip(*(divided(backend, groups, chosen, activation) for backend in ("megablocks", "auto")), strict=True):
                torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, at=(chosen, activation): f"{at}: {m}")
    text, found = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(groups.data.rank)), []
    for backend in ("megablocks", "auto"):
        gpt = model(backend, Divider(groups), moe_router_type="topk", moe_expert_parallel_size=2, moe_num_shared_experts=1)
        loss = gpt(text, labels_BS=text).loss
        found.append([loss, *torch.autograd.grad(loss, list(gpt.parameters()))])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_two_processes_that_divide_the_experts() -> None:
    run_distributed(compared, 2)
