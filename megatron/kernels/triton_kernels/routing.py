"""Routing in Triton: a program has a few rows, with all their candidates at once.

Shapes: N rows; C candidates, BC of them with those that are not there; K choices per row, BK of them likewise; P parents.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank(logit, there):
    """int32 that rises with the logit: NaN is above all, both zeros are equal, and a candidate that is not there is below all."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(there, tl.where(logit != logit, 0x7FFFFFFF, rising), -0x80000000)


@triton.jit
def route_kernel(
    logit, parent, weight, choice, key, probability, logsumexp, entropy, N, C, scale,
    K: tl.constexpr, NORMALIZE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The decision of each row, and its entropy. The key is parent * C + choice."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column, place = tl.arange(0, BC), tl.arange(0, BK)
    inside, there = row < N, (row < N)[:, None] & (column < C)[None, :]
    x = tl.load(logit + row[:, None] * C + column[None, :], mask=there, other=float("-inf"))
    largest = tl.max(tl.where(x != x, float("-inf"), x), 1)
    below = x - largest[:, None]
    part = tl.where(there, tl.exp(below), 0.0)
    total = tl.sum(part, 1)
    p = part / total[:, None]
    spread = tl.sum(tl.where(part > 0, p * below, 0.0), 1)
    tl.store(probability + row[:, None] * C + column[None, :], p, mask=there)
    tl.store(logsumexp + row, largest + tl.log(total), mask=inside)
    tl.store(entropy + row, tl.log(total) - spread, mask=inside)
    left = rank(x, there)
    weights, choices = tl.zeros((BR, BK), dtype=tl.float32), tl.zeros((BR, BK), dtype=tl.int64)
    for k in range(K):
        best = tl.max(left, 1)
        chosen = tl.min(tl.where((left == best[:, None]) & (column < C)[None, :], column[None, :], BC), 1)
        here = column[None, :] == chosen[:, None]
        left = tl.where(here, -0x80000000, left)
        weights = tl.where((place == k)[None, :], tl.sum(tl.where(here, p, 0.0), 1)[:, None], weights)
        choices = tl.where((place == k)[None, :], chosen[:, None].to(tl.int64), choices)
    if NORMALIZE:
        weights = weights / tl.sum(weights, 1)[:, None]
    to, mask = row[:, None] * K + place[None, :], inside[:, None] & (place < K)[None, :]
    first = tl.load(parent + row, mask=inside, other=0) * C
    tl.store(weight + to, weights * scale, mask=mask)
    tl.store(choice + to, choices, mask=mask)
    tl.store(key + to, first[:, None] + choices, mask=mask)


@triton.jit
def route_backward_kernel(
    grad_weight, grad_probability, grad_logsumexp, grad_total, probability, choice, parent, out, N, C, P, scale,
    K: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, PROBABILITY: tl.constexpr, LOGSUMEXP: tl.constexpr, TOTAL: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits. WEIGHT, PROBABILITY, LOGSUMEXP and TOTAL say which gradients there are."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BC)
    inside, there = row < N, (row < N)[:, None] & (column < C)[None, :]
    at = row[:, None] * C + column[None, :]
    p = tl.load(probability + at, mask=there, other=0.0)
    grad = tl.zeros((BR, BC), dtype=tl.float32)
    if PROBABILITY:
        grad += tl.load(grad_probability + at, mask=there, other=0.0)
    if TOTAL:
        owner = tl.load(parent + row, mask=inside, other=P)
        grad += tl.load(grad_total + owner[:, None] * C + column[None, :], mask=there & (owner < P)[:, None], other=0.0)
    if WEIGHT:
        given, chosen = tl.zeros((BR, BC), dtype=tl.float32), tl.zeros((BR, BC), dtype=tl.int1)
        for k in range(K):
            here = column[None, :] == tl.load(choice + row * K + k, mask=inside, other=-1)[:, None]
            given = tl.where(here, tl.load(grad_weight + row * K + k, mask=inside, other=0.0)[:, None] * scale, given)
            chosen = chosen | here
        if NORMALIZE:
            total = tl.sum(tl.where(chosen, p, 0.0), 1)
            inner = tl.sum(tl.where(chosen, p * given, 0.0), 1)
            given = (given - (inner / total)[:, None]) / total[:, None]
        grad += tl.where(chosen, given, 0.0)
    shift = tl.sum(grad * p, 1)
    if LOGSUMEXP:
        shift -= tl.load(grad_logsumexp + row, mask=inside, other=0.0)
    tl.store(out + at, p * (grad - shift[:, None]), mask=there)
