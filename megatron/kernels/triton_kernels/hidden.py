"""The hidden layer of the experts in Triton. A tile is rows of one expert; each LoRE that one of them uses is one more step of the product's depth.

Shapes: R rows; K depth; N columns; Q rank; L LoREs per row. `place` says where the LoRE rows of row r stand, `lore` which LoRE stands at a place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.kernels.triton_kernels.activations import activate, derivative
from megatron.kernels.triton_kernels.products import add_product, source_row


@triton.jit
def add_lore(
    acc, u, scale, used, factor, column, Q, N, stride_q, stride_n,
    BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (scale * u) @ factor for the rows that are `used`. `u` points at the LoRE rows, `factor` at the LoRE's [Q, N]."""
    for q0 in tl.range(0, Q, BQ, num_stages=1):  # one step for most ranks: a pipeline would only take registers
        q = q0 + tl.arange(0, BQ)
        z = tl.load(u[:, None] + q[None, :], mask=used[:, None] & (q < Q)[None, :], other=0.0)
        z = (z.to(acc.dtype) * scale[:, None]).to(z.dtype)
        b = tl.load(factor + q[:, None] * stride_q + column[None, :] * stride_n, mask=(q < Q)[:, None] & (column < N)[None, :], other=0.0)
        acc = tl.dot(z, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def add_chosen_lores(
    acc, row, inside, u, pi, place, lore, lore_rows, first, last,
    factor, stride_g, column, Q, N, stride_q, stride_n,
    L: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each choice, a step for every LoRE of `first` to `last` that a row of the tile has chosen; the other rows count as zero in it."""
    for choice in tl.static_range(L):
        stands = tl.load(place + row * L + choice, mask=inside, other=-1)
        there = inside & (stands >= 0) & (stands < lore_rows)
        scale = tl.load(pi + row * L + choice, mask=there, other=0.0).to(acc.dtype)
        chosen = tl.load(lore + stands, mask=there, other=-1).to(tl.int64)  # so that g times a stride does not overflow
        low = tl.maximum(tl.min(tl.where(there, chosen, last)), first)
        high = tl.minimum(tl.max(tl.where(there, chosen, -1)), last)
        for g in tl.range(low, high + 1, num_stages=1):
            used = there & (chosen == g)
            if tl.max(used.to(tl.int32)) > 0:
                here = factor + g * stride_g
                acc = add_lore(acc, u + stands * Q, scale, used, here, column, Q, N, stride_q, stride_n, BQ, PRECISION)
    return acc


@triton.jit
def project_kernel(
    x, weight, bias, u, pi, place, lore, factor, other, before, out,
    order, group_P, first_P, bounds, groups, lore_rows, per_expert, R, K, N, Q,
    stride_e, stride_k, stride_n, stride_g, stride_q, stride_b,
    WEIGHT: tl.constexpr, LORES: tl.constexpr, L: tl.constexpr, BIAS: tl.constexpr, REORDER: tl.constexpr,
    ACTIVATION: tl.constexpr, BEFORE: tl.constexpr, OTHER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """p[r] = x[r] @ weight[e] + sum over l of pi[r, l] * u[place[r, l]] @ factor[lore[place[r, l]]] + bias[e]; out = act(p), times or plus `other`.

    LORES: "none"; "own": the expert's one LoRE, for all its rows, unscaled; "chosen". REORDER: the tile's rows are `order`[places]: sorted by LoRE,
    so that the rows of a tile use few LoREs. BEFORE: p is stored too. OTHER: "none", "times" or "plus".
    """
    expert = tl.load(group_P + tl.program_id(0)).to(tl.int64)
    if expert < groups:
        row = tl.load(first_P + tl.program_id(0)) + tl.arange(0, BM)
        inside = row < tl.load(bounds + expert + 1)
        if REORDER:
            row = source_row(row, order, inside, 1)
            inside = inside & (row >= 0) & (row < R)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=ACC)
        if WEIGHT:
            acc = add_product(acc, x + row * K, weight + expert * stride_e, inside, column, K, N, stride_k, stride_n, BK, PRECISION)
        if LORES == "own":
            here = factor + expert * stride_g
            acc = add_lore(acc, u + row * Q, tl.full((BM,), 1.0, ACC), inside, here, column, Q, N, stride_q, stride_b, BQ, PRECISION)
        elif LORES == "chosen":
            first = expert * per_expert
            acc = add_chosen_lores(
                acc, row, inside, u, pi, place, lore, lore_rows, first, first + per_expert - 1,
                factor, stride_g, column, Q, N, stride_q, stride_b, L, BQ, PRECISION,
            )  # fmt: skip
        if BIAS:
            acc += tl.load(bias + expert * N + column, mask=column < N, other=0.0).to(ACC)[None, :]
        mask = inside[:, None] & (column < N)[None, :]
        if BEFORE:
            tl.store(before + row[:, None] * N + column[None, :], acc.to(before.dtype.element_ty), mask=mask)
        acc = activate(acc, ACTIVATION)
        if OTHER == "times":
            acc *= tl.load(other + row[:, None] * N + column[None, :], mask=mask, other=0.0).to(ACC)
        elif OTHER == "plus":
            acc += tl.load(other + row[:, None] * N + column[None, :], mask=mask, other=0.0).to(ACC)
        tl.store(out + row[:, None] * N + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    grad, up, gate, grad_up, grad_gate, size, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Of hidden = act(up): grad_up. GATED, of hidden = act(gate) * up: grad_up and grad_gate. Elementwise."""
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(grad + cell, mask=cell < size, other=0.0).to(ACC)
    u = tl.load(up + cell, mask=cell < size, other=0.0).to(ACC)
    if GATED:
        g = tl.load(gate + cell, mask=cell < size, other=0.0).to(ACC)
        tl.store(grad_up + cell, (given * activate(g, ACTIVATION)).to(grad_up.dtype.element_ty), mask=cell < size)
        tl.store(grad_gate + cell, (given * u * derivative(g, ACTIVATION)).to(grad_gate.dtype.element_ty), mask=cell < size)
    else:
        tl.store(grad_up + cell, (given * derivative(u, ACTIVATION)).to(grad_up.dtype.element_ty), mask=cell < size)


@triton.jit
def scale_kernel(grad_z, u, pi, order, grad_pi, scaled_u, scaled_grad, rows, Q, BR: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr):
    """At place n with choice c = order[n]: grad_pi[c] = <grad_z[n], u[n]>, scaled_u[n] = pi[c] u[n], scaled_grad[n] = pi[c] grad_z[n]."""
    place = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = place < rows
    choice = tl.load(order + place, mask=inside, other=-1)
    there = inside & (choice >= 0) & (choice < rows)
    scale = tl.load(pi + choice, mask=there, other=0.0).to(ACC)
    product = tl.zeros((BR,), dtype=ACC)
    for q0 in range(0, Q, BQ):
        q = q0 + tl.arange(0, BQ)
        mask, cell = inside[:, None] & (q < Q)[None, :], place[:, None] * Q + q[None, :]
        z = tl.load(grad_z + cell, mask=mask, other=0.0).to(ACC)
        v = tl.load(u + cell, mask=mask, other=0.0).to(ACC)
        product += tl.sum(z * v, 1)
        tl.store(scaled_u + cell, (v * scale[:, None]).to(scaled_u.dtype.element_ty), mask=mask)
        tl.store(scaled_grad + cell, (z * scale[:, None]).to(scaled_grad.dtype.element_ty), mask=mask)
    tl.store(grad_pi + choice, product.to(grad_pi.dtype.element_ty), mask=there)
