"""The cases: what is computed, by whom, and what it must cost. One case is one group of rows in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron.kernels import grouped_gemm as gemm
from megatron.kernels import grouped_lore as lore
from megatron.kernels import permute as perm
from megatron.kernels import route as routing
from megatron.kernels.registry import Op
from moe_bench import libraries, rooflines
from moe_bench.libraries import with_backward, without_backward
from moe_bench.machine import Call
from moe_bench.rooflines import Cost
from moe_bench.shapes import Inputs, Routed

DENSE, GROUPED_MM = "dense matmul, as many FLOPs", "built on F.grouped_mm"
Build = Callable[[Inputs, Routed], Call]


class Case(NamedTuple):
    """One call."""

    name: str
    op: Op[Any] | None
    """The registry whose implementations are candidates. None: several ops together, `auto` and `reference`."""
    ours: Callable[[Inputs, Routed, str], Call]
    """(inputs, routed, implementation) -> the call."""
    others: dict[str, Build]
    cost: Callable[[Routed, int], Cost]
    """(routed, bytes of a number)."""
    needs: Callable[[Inputs], bool] = lambda inputs: True
    """Whether the case exists for this shape."""

    def candidates(self, inputs: Inputs) -> dict[str, Callable[[int], Call]]:
        """Name -> the call for a number of tokens. The reference is first."""

        def prepare(build: Build) -> Callable[[int], Call]:
            return lambda tokens: build(inputs, inputs.routed(tokens))

        def own(name: str) -> Build:
            return lambda inputs, routed: self.ours(inputs, routed, name)

        names = ["auto"] if self.op is None else available(self.op, inputs.device)
        everything = {"reference": own("reference"), **{name: own(name) for name in names}, **self.others}
        return {name: prepare(build) for name, build in everything.items()}


def available(op: Op[Any], device: str) -> list[str]:
    """The implementations that can run on the device, best first."""
    return [name for name, reason in op.status(device).items() if reason is None]


def all_cases() -> Iterator[Case]:
    """In the order of the table."""
    yield from gemm_cases()
    yield lore_case("grouped_lore forward", without_backward, lambda r, width: rooflines.lore_forward(r.sizes, width))
    both = "grouped_lore forward + backward"
    yield lore_case(both, None, lambda r, width: rooflines.lore_forward(r.sizes, width, save=True) + rooflines.lore_backward(r.sizes, width))
    yield from permute_cases()
    yield from route_cases()
    yield from expert_cases()


# ---------------------------------------------------------------- grouped_gemm


def gemm_cases() -> Iterator[Case]:
    """Both layouts of the weight, and the gradient of the weight."""

    def dense(x: Callable[[Routed], Tensor], weight: Callable[[Inputs], Tensor]) -> Build:
        return lambda i, r: without_backward(lambda: torch.mm(x(r), weight(i)))

    yield Case(
        "grouped_gemm [E, out, in]",
        gemm.OP,
        lambda i, r, name: without_backward(lambda: gemm.grouped_gemm(r.x_RD, i.up_EFD, r.rows_E, transposed=True, backend=name)),
        {
            GROUPED_MM: lambda i, r: without_backward(lambda: functional.grouped_mm(r.x_RD, i.up_EFD.mT, offs=r.offsets_E)),
            DENSE: dense(lambda r: r.x_RD, lambda i: i.up_EFD[0].t()),
        },
        lambda r, width: rooflines.grouped_gemm(r.sizes, width),
    )
    yield Case(
        "grouped_gemm [E, in, out]",
        gemm.OP,
        lambda i, r, name: without_backward(lambda: gemm.grouped_gemm(r.h_RF, i.down_EFD, r.rows_E, backend=name)),
        {
            GROUPED_MM: lambda i, r: without_backward(lambda: functional.grouped_mm(r.h_RF, i.down_EFD, offs=r.offsets_E)),
            DENSE: dense(lambda r: r.h_RF, lambda i: i.down_EFD[0]),
        },
        lambda r, width: rooflines.grouped_gemm(r.sizes, width),
    )
    yield Case(
        "grouped_gemm outer",
        gemm.OP,
        lambda i, r, name: without_backward(lambda: gemm.OP.resolve(name, i.device).outer(r.h_RF, r.x_RD, r.rows_E)),
        {
            GROUPED_MM: lambda i, r: without_backward(lambda: functional.grouped_mm(r.h_RF.t(), r.x_RD, offs=r.offsets_E)),
            DENSE: lambda i, r: without_backward(lambda: torch.mm(r.h_RF.t(), r.x_RD)),
        },
        lambda r, width: rooflines.grouped_outer(r.sizes, width),
    )


# ---------------------------------------------------------------- grouped_lore


def lore_case(name: str, once: Callable[[Any], Call] | None, cost: Callable[[Routed, int], Cost]) -> Case:
    """`once` None: forward and backward."""

    def wanted(forward: Any, inputs: Inputs, routed: Routed) -> Call:
        pi = [] if routed.choice is None else [routed.choice.pi_RL]
        return once(forward) if once else with_backward(forward, [routed.x_RD, *pi, *inputs.parameters])

    def ours(inputs: Inputs, routed: Routed, backend: str) -> Call:
        return wanted(lambda: lore.grouped_lore(routed.x_RD, inputs.layer(routed), backend=backend), inputs, routed)

    def library(inputs: Inputs, routed: Routed) -> Call:
        return wanted(lambda: libraries.grouped_mm_hidden(inputs, routed, routed.x_RD), inputs, routed)

    def dense(inputs: Inputs, routed: Routed) -> Call:
        x, weight = libraries.dense_hidden(inputs, routed)
        return once(lambda: functional.linear(x, weight)) if once else with_backward(lambda: functional.linear(x, weight), [x, weight])

    return Case(name, lore.OP, ours, {GROUPED_MM: library, DENSE: dense}, cost)


# ---------------------------------------------------------------- permute and combine


def permute_cases() -> Iterator[Case]:
    """Rows to their experts, back, and both with their gradients."""

    def permute(r: Routed, name: str) -> Tensor:
        return perm.permute(r.x_TD, r.order, backend=name)

    def both(i: Inputs, r: Routed, name: str) -> Call:
        return with_backward(lambda: perm.combine(permute(r, name), r.order, r.weight_TK, backend=name), [r.x_TD, r.weight_TK])

    def moved(r: Routed, width: int) -> Cost:
        return rooflines.move_rows(len(r.x_TD), r.sizes.rows, r.sizes.width_in, width)

    yield Case("permute", perm.OP, lambda i, r, name: without_backward(lambda: permute(r, name)), {}, moved)
    yield Case(
        "combine",
        perm.OP,
        lambda i, r, name: without_backward(lambda: perm.combine(r.x_RD, r.order, r.weight_TK, backend=name)),
        {},
        lambda r, width: rooflines.move_rows(r.sizes.rows, len(r.x_TD), r.sizes.width_in, width),
    )
    # There: x read, rows written and read, y written. Back: its gradient and the rows read, theirs written and read, that of x written.
    yield Case(
        "permute + combine, forward + backward",
        perm.OP,
        both,
        {},
        lambda r, width: rooflines.move_rows(2 * len(r.x_TD) + 3 * r.sizes.rows, 2 * len(r.x_TD) + 2 * r.sizes.rows, r.sizes.width_in, width),
    )


# ---------------------------------------------------------------- routers


def route_cases() -> Iterator[Case]:
    """From logits to choices, weights, statistics and the sorted order: of the experts, and of the LoREs of each row's expert."""

    def experts(i: Inputs, r: Routed, name: str) -> Call:
        selection = routing.Selection(i.shape.top_k, False, 1.0)
        return with_backward(lambda: routing.route(r.logit_TE, selection, backend=name).weight_NK, [r.logit_TE])

    def lores(i: Inputs, r: Routed, name: str) -> Call:
        selection = routing.Selection(i.shape.lore_top_k, False, 1.0)
        return with_backward(lambda: routing.route(r.logit_RM, selection, r.rows_E, backend=name).weight_NK, [r.logit_RM])

    for name, call, needs in (
        ("route to experts, forward + backward", experts, lambda i: True),
        ("route to LoREs, forward + backward", lores, lambda i: bool(i.shape.lores)),
    ):
        first = call is experts
        yield Case(name, routing.OP, call, {}, lambda r, width, first=first: rooflines.route((r.logit_TE if first else r.logit_RM).numel()), needs)


# ---------------------------------------------------------------- the experts of a layer


def expert_cases() -> Iterator[Case]:
    """From tokens and their experts to the layer's output, as Hugging Face's `MixtralExperts`."""

    def ours(inputs: Inputs, routed: Routed, name: str) -> Tensor:
        order = perm.sort_by_group(routed.expert_TK, inputs.shape.experts)
        x_RD = perm.permute(routed.x_TD, order, backend=name)
        hidden_RF = lore.grouped_lore(x_RD, inputs.layer(routed)._replace(rows_E=order.rows_G), backend=name)
        y_RD = gemm.grouped_gemm(hidden_RF, inputs.down_EFD, order.rows_G, backend=name)
        return perm.combine(y_RD, order, routed.weight_TK, backend=name)

    def needs(inputs: Inputs, routed: Routed) -> list[Tensor]:
        return [routed.x_TD, routed.weight_TK, *inputs.parameters, inputs.down_EFD]

    def theirs(implementation: str, backward: bool) -> Build:
        def build(inputs: Inputs, routed: Routed) -> Call:
            module = libraries.huggingface_experts(inputs, implementation)
            weight_TK = routed.weight_TK.detach().to(inputs.dtype).requires_grad_()

            def forward() -> Tensor:
                y_TD: Tensor = module(routed.x_TD, routed.expert_TK, weight_TK)
                return y_TD

            return with_backward(forward, [routed.x_TD, weight_TK, *module.parameters()]) if backward else without_backward(forward)

        return build

    def gated(inputs: Inputs) -> bool:
        return inputs.shape.gated and not inputs.shape.lores

    for backward, name in ((False, "experts forward"), (True, "experts forward + backward")):
        yield Case(
            name,
            None,
            lambda i, r, n, b=backward: with_backward(lambda: ours(i, r, n), needs(i, r)) if b else without_backward(lambda: ours(i, r, n)),
            {"Hugging Face grouped_mm": theirs("grouped_mm", backward), "Hugging Face eager": theirs("eager", backward)},
            lambda r, width, b=backward: rooflines.experts(r.sizes, width, len(r.x_TD), backward=b),
            gated,
        )
