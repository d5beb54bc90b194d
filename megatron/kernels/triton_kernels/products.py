"""Grouped products in Triton: rows by their group's matrix, and what a group's rows give together. Sums are in ACC.

Shapes: R rows sorted by group; K depth; N columns; G groups. Any size: the edges of tiles are masked. No atomics, and the order of every sum is
fixed, so two runs are equal bit for bit. Offsets are 64-bit between rows and groups, 32-bit inside one matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def source_row(place, order, inside, CHOICES: tl.constexpr):
    """The row that stands at a place: itself (CHOICES = 0), or that of the flat choice row * CHOICES + k which `order` names."""
    row = place
    if CHOICES > 0:
        row = tl.load(order + place, mask=inside, other=0) // CHOICES
    return row


@triton.jit
def add_product(acc, x, matrix, inside, column, K, N, stride_k, stride_n, BK: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x @ matrix. `x` points at the tile's rows, whose elements lie side by side; `matrix` at the group's [K, N]."""
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(matrix + k[:, None] * stride_k + column[None, :] * stride_n, mask=(k < K)[:, None] & (column < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def matmul_kernel(
    x, order, weight, out,
    group_P, first_P, bounds, groups, rows_of_x, K, N, stride_g, stride_k, stride_n,
    CHOICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[r] = x[source of r] @ weight[group of r]."""
    group = tl.load(group_P + tl.program_id(0)).to(tl.int64)
    if group < groups:
        place = tl.load(first_P + tl.program_id(0)) + tl.arange(0, BM)
        inside = place < tl.load(bounds + group + 1)
        row = source_row(place, order, inside, CHOICES)
        readable = inside & (row >= 0) & (row < rows_of_x)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=ACC)
        acc = add_product(acc, x + row * K, weight + group * stride_g, readable, column, K, N, stride_k, stride_n, BK, PRECISION)
        tl.store(out + place[:, None] * N + column[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


@triton.jit
def outer_kernel(
    left, left_order, right, right_order, out,
    bounds, rows_of_left, rows_of_right, H, W, tiles_j,
    LEFT_CHOICES: tl.constexpr, RIGHT_CHOICES: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[g] = left_g^T @ right_g over the rows of group g, zero without rows. A program makes one tile of it, and passes over the rows in order."""
    group = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) // tiles_j) * BI + tl.arange(0, BI)
    j = (tl.program_id(1) % tiles_j) * BJ + tl.arange(0, BJ)
    begin, end = tl.load(bounds + group), tl.load(bounds + group + 1)
    acc = tl.zeros((BI, BJ), dtype=ACC)
    for r0 in range(begin, end, BR):
        place = r0 + tl.arange(0, BR)
        inside = place < end
        a_row = source_row(place, left_order, inside, LEFT_CHOICES)
        b_row = source_row(place, right_order, inside, RIGHT_CHOICES)
        a_there = inside & (a_row >= 0) & (a_row < rows_of_left)
        b_there = inside & (b_row >= 0) & (b_row < rows_of_right)
        a = tl.load(left + a_row[None, :] * H + i[:, None], mask=a_there[None, :] & (i < H)[:, None], other=0.0)
        b = tl.load(right + b_row[:, None] * W + j[None, :], mask=b_there[:, None] & (j < W)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    tl.store(out + group * H * W + i[:, None] * W + j[None, :], acc.to(out.dtype.element_ty), mask=(i < H)[:, None] & (j < W)[None, :])


@triton.jit
def sum_rows_kernel(x, out, bounds, N, BR: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """out[g] = sum of the rows of group g."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    begin, end = tl.load(bounds + group), tl.load(bounds + group + 1)
    acc = tl.zeros((BR, BN), dtype=ACC)
    for r0 in range(begin, end, BR):
        place = r0 + tl.arange(0, BR)
        acc += tl.load(x + place[:, None] * N + column[None, :], mask=(place < end)[:, None] & (column < N)[None, :], other=0.0).to(acc.dtype)
    tl.store(out + group * N + column, tl.sum(acc, 0).to(out.dtype.element_ty), mask=column < N)
