"""The compiled kernels against their definitions on small inputs: what `csrc/build.py` runs before a build is put in place."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megatron.kernels.adam import AdamSettings, AdamTensors, adam_update, gradient_norm
from megatron.kernels.attention import HeadLayout, Rotation, fused_attention
from megatron.kernels.decode import OP as DECODE
from megatron.kernels.decode import interface as parts
from megatron.kernels.decode.quantize import quantize_rows
from megatron.kernels.grouped_gemm import grouped_gemm
from megatron.kernels.grouped_lore import grouped_lore
from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection
from megatron.kernels.linear_cross_entropy import linear_cross_entropy
from megatron.kernels.permute import combine, permute, sort_by_group
from megatron.kernels.rms_norm import rms_norm
from megatron.kernels.route import Selection, choice_statistics, route

ROWS = [37, 0, 150, 5]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}


def check(built: ModuleType, name: str) -> None:
    """Raises AssertionError that names what the instruction set `name` computes differently. Leaves it chosen."""
    if found := built.difference(name):
        raise AssertionError(found)
    built.use_instruction_set(name)
    for dtype in TOLERANCE:
        for op in (_gemm, _hidden, _rows, _routes, _attention, _norm, _loss, _update, _decode):
            ours, right = op(dtype, "compiled"), op(dtype, "reference")
            for place, (got, wanted) in enumerate(zip(ours, right, strict=True)):
                scale = wanted.double().abs().max().item() or 1.0
                error = (got.double() - wanted.double()).abs().max().item() / scale
                if not error <= TOLERANCE[dtype]:
                    raise AssertionError(f"{op.__name__[1:]}, {dtype}: result {place} differs by {error:.1e} of its largest number")


def _draw(dtype: torch.dtype) -> tuple[torch.Generator, list[Tensor]]:
    generator, experts, lores = torch.Generator().manual_seed(0), len(ROWS), 3 * len(ROWS)
    shapes = [(sum(ROWS), 72), (experts, 100, 72), (lores, 9, 72), (lores, 9, 100), (experts, 100, 72), (experts, 100)]
    return generator, [torch.randn(shape, generator=generator).mul(0.3).to(dtype).requires_grad_() for shape in shapes]


def _gemm(dtype: torch.dtype, backend: str) -> list[Tensor]:
    _, (x, weight, *_rest) = _draw(dtype)
    y = grouped_gemm(x, weight, torch.tensor(ROWS), transposed=True, backend=backend)
    back = grouped_gemm(y, weight, torch.tensor(ROWS), backend=backend)
    return [y.detach(), back.detach(), *torch.autograd.grad(back.float().square().sum(), (x, weight))]


def _hidden(dtype: torch.dtype, backend: str) -> list[Tensor]:
    generator, (x, weight, a, b, gate, bias) = _draw(dtype)
    local = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(sum(ROWS))])
    expert = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(ROWS))
    results = []
    for per_row in (1, 2):
        choice = LoreChoice(torch.rand(sum(ROWS), per_row, generator=generator), sort_by_group(local[:, :per_row] + 3 * expert[:, None], len(a)))
        layer = HiddenLayer(torch.tensor(ROWS), "silu", Projection(weight, a, b, bias), Projection(gate), choice)
        y = grouped_lore(x, layer, backend=backend)
        results += [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, weight, a, b, gate, bias))]
    return results


def _rows(dtype: torch.dtype, backend: str) -> list[Tensor]:
    generator, (x, *_rest) = _draw(dtype)
    results: list[Tensor] = []
    for per_row in (1, 2, 3):
        group = torch.randint(8, (len(x), per_row), generator=generator)
        order, weight = sort_by_group(group, 7, padded=True, backend=backend), torch.rand(len(x), per_row, generator=generator).requires_grad_()
        y = combine(permute(x, order, backend=backend), order, weight, backend=backend)
        results += [*order, y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, weight))]
    return results


def _routes(dtype: torch.dtype, backend: str) -> list[Tensor]:
    _, (x, *_rest) = _draw(dtype)
    results: list[Tensor] = []
    for selection, rows in ((Selection(1), None), (Selection(2, normalize=True), torch.tensor(ROWS)), (Selection(5, scale=2.0), None)):
        routed = route(x[:, :37], selection, rows, backend=backend)
        numbers = [routed.weight_NK, routed.logsumexp_N, routed.total_PC]
        (grad,) = torch.autograd.grad(torch.stack([t.square().sum() for t in numbers]).sum(), x)
        results += [*(t.detach() for t in numbers), routed.choice_NK, routed.entropy, *routed.order, grad]
        results.append(choice_statistics(routed.choice_NK, 37, len(x) // 4, backend=backend))
    return results


def _attention(dtype: torch.dtype, backend: str) -> list[Tensor]:
    generator, layout = torch.Generator().manual_seed(0), HeadLayout(4, 2, 20)
    fused = torch.randn(2, 131, 160, generator=generator).to(dtype).requires_grad_()
    angles = torch.rand(131, 8, generator=generator)
    y = fused_attention(fused, layout, Rotation(angles.cos(), angles.sin()), backend=backend)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), fused)]


def _norm(dtype: torch.dtype, backend: str) -> list[Tensor]:
    _, (x, weight, *_rest) = _draw(dtype)
    scale = weight[0, 0].detach().requires_grad_()
    y = rms_norm(x, scale, 1e-5, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.float().pow(3).sum(), (x, scale))]


def _loss(dtype: torch.dtype, backend: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 40, generator=generator).mul(0.5).to(dtype).requires_grad_() for n in (131, 409))
    mean, loss = linear_cross_entropy(hidden, weight, torch.arange(131) * 3, torch.rand(131, generator=generator), backend=backend)
    return [loss, *torch.autograd.grad(mean, (hidden, weight))]


def _update(dtype: torch.dtype, backend: str) -> list[Tensor]:
    _, drawn = _draw(dtype)
    gradients = [t.detach() for t in drawn]
    weights, averages, squares = ([t.float() * factor for t in gradients] for factor in (1.0, 0.1, 0.0))
    rounded = [torch.zeros_like(t, dtype=torch.bfloat16) for t in gradients]
    norm = gradient_norm(gradients, backend=backend)
    settings = AdamSettings(1e-2, (0.9, 0.95), 1e-8, 0.1, True, norm)
    adam_update(AdamTensors(weights, gradients, averages, squares, [2.0] * len(weights), rounded), settings, backend=backend)
    wrong = [narrow.float() - weight.bfloat16().float() for narrow, weight in zip(rounded, weights, strict=True)]
    return [torch.tensor(norm), *weights, *averages, *squares, *wrong]


def _decode(dtype: torch.dtype, backend: str) -> list[Tensor]:
    generator, (x, up, a, b, gate, bias) = _draw(dtype)
    x, up, a, b, gate = (t.detach().flatten(0, -2).contiguous() for t in (x, up, a, b, gate))
    rows, experts, norm = x[:5].float(), len(ROWS), parts.Input("rmsnorm", bias.detach().float()[0, :72].contiguous(), None, 1e-5)
    router = parts.Matrix(torch.randn(experts, 72, generator=generator))
    lores = parts.Lores(9, parts.Choice(3, 2), parts.Matrix(torch.randn(3 * experts, 72, generator=generator)))
    results = []
    for store in (parts.Matrix, quantize_rows):
        up_part = parts.Projection(store(up), bias.detach().float(), None, store(a), store(b))
        layer = parts.Experts(
            norm,
            parts.Choice(experts, 2, normalize=True),
            router,
            experts,
            up_part,
            parts.Projection(store(gate)),
            parts.Projection(store(gate)),
            "silu",
            0,
            lores,
        )
        results += _decoded(layer, parts.Linear(store(up), None, norm), rows, backend)
    angles, layout = torch.rand(9, 8, generator=generator), HeadLayout(4, 2, 20)
    part = parts.Attention(layout, None, parts.Input(), parts.Input(), False, angles.cos(), angles.sin())
    fused, caches = (
        torch.randn(2, 160, generator=generator),
        [[torch.randn(2, 9, 20, generator=generator).to(dtype) for _ in range(2)] for _ in range(2)],
    )
    if backend == "reference":
        return [*results, DECODE.resolve(backend, "cpu").attention(part, fused, [(k, v) for k, v in caches], [0, 7]), *caches[0], *caches[1]]
    y = torch.empty(2, 80)
    places = [caches[row][which].data_ptr() for which in range(2) for row in range(2)]
    DECODE.resolve(backend, "cpu").Attention(part, dtype)(fused, y, places, [0, 7, 9, 9], 2)
    return [*results, y, *caches[0], *caches[1]]


def _decoded(layer: parts.Experts, linear: parts.Linear, rows: Tensor, backend: str) -> list[Tensor]:
    """What the expert layer and the linear layer give and choose."""
    module, routed = DECODE.resolve(backend, "cpu"), parts.Routed.empty(layer, len(rows))
    if backend == "reference":
        module.route(layer, rows, routed)
        return [rows + module.experts(layer, rows, routed), module.linear(linear, rows), *routed]
    y, product = torch.empty_like(rows), torch.empty(len(rows), len(linear.matrix.weight))
    module.Experts(layer)(rows, rows, y, routed, 2)
    module.Linear(linear)(rows, product, 2)
    return [y, product, *routed]
