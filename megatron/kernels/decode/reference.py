"""The definitions, by PyTorch. Shapes as in the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.attention.reference import turned
from megatron.kernels.decode.interface import Attention, Choice, Experts, Input, Linear, Matrix, Projection, Routed

LARGEST_OF_16_BITS = 32767


def prepared(given: Input, x_NK: Tensor) -> Tensor:
    """The rows as they are multiplied."""
    if given.kind == "rmsnorm":
        y = x_NK * torch.rsqrt(x_NK.square().mean(-1, keepdim=True) + given.epsilon)
    elif given.kind == "layernorm":
        y = functional.layer_norm(x_NK, x_NK.shape[-1:], eps=given.epsilon)
    elif given.kind == "gate":
        up, gate = x_NK.chunk(2, -1)
        return ACTIVATIONS[given.activation].value(gate) * up
    else:
        return ACTIVATIONS[given.activation].value(x_NK) if given.kind == "activation" else x_NK
    y = y if given.scale is None else y * given.scale
    return y if given.shift is None else y + given.shift


def rounded_for(matrix: Matrix, x_NK: Tensor) -> Tensor:
    """The rows that a matrix multiplies: beside int8 weights rounded to 16 bits, each row with a scale of its own, so that sums are whole numbers."""
    if matrix.scale is None:
        return x_NK
    scale_N1 = x_NK.abs().amax(-1, keepdim=True) / LARGEST_OF_16_BITS
    return torch.round(x_NK / scale_N1.clamp(min=torch.finfo(torch.float32).tiny)) * scale_N1


def linear(layer: Linear, x_NK: Tensor) -> Tensor:
    """y_NO."""
    return functional.linear(rounded_for(layer.matrix, prepared(layer.input, x_NK)), layer.matrix.wide(), layer.bias)


def choose(rule: Choice, logit_NC: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen_Nk, weight_Nk). Of equal scores the first is taken."""
    score_NC = logit_NC.sigmoid() if rule.sigmoid else logit_NC.softmax(-1)
    preference_NC = score_NC if rule.bias is None else score_NC + rule.bias
    chosen_Nk = preference_NC.argsort(dim=-1, descending=True, stable=True)[:, : rule.chosen]
    weight_Nk = score_NC.gather(1, chosen_Nk)
    if rule.normalize:
        weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return chosen_Nk, weight_Nk * rule.scale


def route(layer: Experts, x_ND: Tensor, routed: Routed) -> None:
    """Writes the experts of each row and their weights into `routed`."""
    assert layer.router is not None
    chosen_Nk, weight_Nk = choose(layer.choice, prepared(layer.input, x_ND) @ layer.router.wide().T)
    routed.expert_Nk.copy_(chosen_Nk)
    routed.weight_Nk.copy_(weight_Nk)


def experts(layer: Experts, x_ND: Tensor, routed: Routed, slot_Nk: Tensor | None = None) -> Tensor:
    """The weighted sum of the chosen experts' results, [N, D]. Writes the chosen LoREs into `routed`.

    `slot_Nk`: where the chosen experts lie in the matrices. None: at their numbers.
    """
    y_ND = torch.zeros_like(x_ND)
    slot_Nk = routed.expert_Nk if slot_Nk is None else slot_Nk
    for n, row_D in enumerate(prepared(layer.input, x_ND)):
        for k, slot in enumerate(slot_Nk[n].tolist()):
            y_ND[n] += routed.weight_Nk[n, k] * _expert(layer, row_D, slot, routed.lore_NkL[n, k])
    return y_ND


def attention(layer: Attention, fused_NW: Tensor, caches: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> Tensor:
    """context of the new tokens, [N, H*d]. Their keys and values are written into their caches, [G, P, d], which hold `lengths` tokens."""
    context = []
    for fused_W, (keys_GPd, values_GPd), length in zip(fused_NW, caches, lengths, strict=True):
        query_Hd, key_Gd, value_Gd = (part[0, 0] for part in layer.layout.views(fused_W[None, None]))
        query_Hd, key_Gd = (_ready(layer, given, x, length) for given, x in ((layer.query_norm, query_Hd), (layer.key_norm, key_Gd)))
        keys_GPd[:, length], values_GPd[:, length] = key_Gd, value_Gd
        first = 0 if layer.window is None else max(0, length - layer.window)
        seen = slice(first, length + 1)
        repeated = layer.layout.heads // layer.layout.kv_heads
        keys_HPd, values_HPd = (part[:, seen].float().repeat_interleave(repeated, 0) for part in (keys_GPd, values_GPd))
        score_HP = torch.einsum("hd,hpd->hp", query_Hd, keys_HPd) / layer.layout.head_dim**0.5
        if layer.slopes is not None:
            score_HP = score_HP - layer.slopes[:, None] * torch.arange(length - first, -1, -1)
        context.append(torch.einsum("hp,hpd->hd", score_HP.softmax(-1), values_HPd).flatten())
    return torch.stack(context)


def _ready(layer: Attention, given: Input, x: Tensor, position: int) -> Tensor:
    """Heads [.., d], normalised and turned."""
    x = prepared(given, x.flatten()).view_as(x) if layer.over_all_heads else prepared(given, x)
    if layer.cosines is None or layer.sines is None:
        return x
    return turned(x[None, None], layer.cosines[position : position + 1], layer.sines[position : position + 1])[0, 0]


def _expert(layer: Experts, row_D: Tensor, slot: int, lore_L: Tensor) -> Tensor:
    """One expert's result for one row; writes the LoREs that it chooses into `lore_L`."""
    weight_L = torch.ones(1)
    numbers = torch.zeros(1, dtype=torch.int64)
    if layer.lores is not None:
        if layer.lores.router is not None:
            router = layer.lores.router
            logit_M = _of_slot(layer, router.wide(), slot) @ rounded_for(router, row_D)
            chosen_1L, weight_1L = choose(layer.lores.choice, logit_M[None])
            lore_L.copy_(chosen_1L[0])
            numbers, weight_L = chosen_1L[0], weight_1L[0]
        numbers = numbers + slot * layer.lores.choice.candidates

    def project(projection: Projection) -> Tensor:
        thin = row_D if projection.left is None else _of_slot(layer, projection.left.wide(), slot) @ rounded_for(projection.left, row_D)
        y_F = _of_slot(layer, projection.matrix.wide(), slot) @ rounded_for(projection.matrix, thin)
        if projection.lore_a is not None and projection.lore_b is not None and layer.lores is not None:
            for number, weight in zip(numbers.tolist(), weight_L, strict=True):
                rows = slice(number * layer.lores.rank, (number + 1) * layer.lores.rank)
                y_F = y_F + (weight * (projection.lore_a.wide()[rows] @ rounded_for(projection.lore_a, row_D))) @ projection.lore_b.wide()[rows]
        return y_F if projection.bias is None else y_F + projection.bias[slot]

    activation = ACTIVATIONS[layer.activation].value
    hidden_F = activation(project(layer.up)) if layer.gate is None else activation(project(layer.gate)) * project(layer.up)
    y_D = hidden_F @ _of_slot(layer, layer.down.matrix.wide(), slot)
    if layer.down.left is not None:
        y_D = y_D @ _of_slot(layer, layer.down.left.wide(), slot)
    return y_D if layer.down.bias is None else y_D + layer.down.bias[slot]


def _of_slot(layer: Experts, stacked: Tensor, slot: int) -> Tensor:
    return stacked.view(layer.num_experts, -1, stacked.shape[1])[slot]
