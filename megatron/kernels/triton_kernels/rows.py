"""Row permutation in Triton: gathers only, so that no two programs write to the same row.

Shapes: T tokens; R rows; D width; CHOICES per token. A place beyond the rows stands for an empty choice and adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(x, order, out, rows, tokens, D, CHOICES: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """out[r] = x[order[r] // CHOICES]."""
    place = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    token = tl.load(order + place, mask=place < rows, other=0) // CHOICES
    there = (token >= 0) & (token < tokens)
    value = tl.load(x + token[:, None] * D + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0)
    tl.store(out + place[:, None] * D + column[None, :], value, mask=(place < rows)[:, None] & (column < D)[None, :])


@triton.jit
def combine_kernel(
    rows, inverse, weight, out, num_rows, tokens, D,
    CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weight[t, k] * rows[inverse[t, k]]; a weight is 1 unless WEIGHTED."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BT, BD), dtype=ACC)
    for k in tl.static_range(CHOICES):
        place = tl.load(inverse + token * CHOICES + k, mask=token < tokens, other=-1)
        there = (place >= 0) & (place < num_rows)
        value = tl.load(rows + place[:, None] * D + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0).to(acc.dtype)
        if WEIGHTED:
            value *= tl.load(weight + token * CHOICES + k, mask=token < tokens, other=0.0).to(acc.dtype)[:, None]
        acc += tl.where(there[:, None], value, 0.0)
    tl.store(out + token[:, None] * D + column[None, :], acc.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (column < D)[None, :])


@triton.jit
def combine_backward_kernel(
    grad, rows, order, weight, grad_rows, grad_weight, num_rows, tokens, D,
    CHOICES: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad_rows[r] = weight[choice] * grad[token], and grad_weight[choice] = <grad[token], rows[r]>, for the choice that stands at place r."""
    place = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = place < num_rows
    choice = tl.load(order + place, mask=inside, other=-1)
    there = (choice >= 0) & (choice < tokens * CHOICES)
    token = choice // CHOICES
    scale = tl.load(weight + choice, mask=there, other=0.0).to(ACC)
    product = tl.zeros((BR,), dtype=ACC)
    for d0 in range(0, D, BD):
        column = d0 + tl.arange(0, BD)
        given = tl.load(grad + token[:, None] * D + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0).to(product.dtype)
        mask = inside[:, None] & (column < D)[None, :]
        row = tl.load(rows + place[:, None] * D + column[None, :], mask=mask, other=0.0).to(product.dtype)
        product += tl.sum(given * row, 1)
        tl.store(grad_rows + place[:, None] * D + column[None, :], (given * scale[:, None]).to(grad_rows.dtype.element_ty), mask=mask)
    tl.store(grad_weight + choice, product.to(grad_weight.dtype.element_ty), mask=there)
