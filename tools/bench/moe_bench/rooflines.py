"""What a call must cost at least: its multiplications and additions, and the bytes that it must read and write once.

Shapes as in `megatron/kernels/grouped_lore`: R rows, D in, F out, E experts, N = R*L LoRE rows of rank Q.
Results that only the call itself uses (x A, for instance) can stay in a cache, so their bytes do not count. Activations and sums of rows cost few
operations beside the products; they do not count either.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_bench.machine import Rates


class Cost(NamedTuple):
    """Of one call."""

    flops: float
    bytes: float

    def __add__(self, other: object) -> Cost:
        """Of both calls."""
        assert isinstance(other, Cost)
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Sizes(NamedTuple):
    """Of one case. `used_experts` and `used_lores` are those that have rows: the matrices of the others need not be read."""

    rows: int
    width_in: int
    width_out: int
    used_experts: int
    lore_rows: int = 0
    rank: int = 0
    used_lores: int = 0
    projections: int = 1
    """2: with a gate."""
    all_experts: int = 0
    all_lores: int = 0
    """Gradients are written for all of them."""


def least_seconds(cost: Cost, rates: Rates) -> float:
    """The roofline: no program needs less."""
    return max(cost.flops / rates.flops, cost.bytes / rates.bandwidth)


def grouped_gemm(s: Sizes, width: int) -> Cost:
    """y = x W per expert; numbers have `width` bytes."""
    return Cost(2.0 * s.rows * s.width_in * s.width_out, width * (s.rows * (s.width_in + s.width_out) + s.used_experts * s.width_in * s.width_out))


def grouped_outer(s: Sizes, width: int) -> Cost:
    """x^T y per expert: an output for every expert."""
    return Cost(2.0 * s.rows * s.width_in * s.width_out, width * (s.rows * (s.width_in + s.width_out) + s.all_experts * s.width_in * s.width_out))


def lore_flops(s: Sizes) -> float:
    """Of the hidden layer's forward; LoREs are on one projection."""
    return 2.0 * (s.projections * s.rows * s.width_in * s.width_out + s.lore_rows * s.rank * (s.width_in + s.width_out))


def parameter_count(s: Sizes, experts: int, lores: int) -> int:
    """Numbers in the weights of `experts` experts and in the factors of `lores` LoREs."""
    return s.projections * experts * s.width_in * s.width_out + lores * s.rank * (s.width_in + s.width_out)


def lore_forward(s: Sizes, width: int, *, save: bool = False) -> Cost:
    """hidden = act(x W + LoREs), gated or not: x and the parameters are read, the hidden layer is written. With `save`, the projections before the
    activation and x A are written too."""
    numbers = s.rows * (s.width_in + s.width_out) + parameter_count(s, s.used_experts, s.used_lores)
    kept = s.projections * s.rows * s.width_out + s.lore_rows * s.rank if save else 0
    return Cost(lore_flops(s), width * (numbers + kept))


def lore_backward(s: Sizes, width: int) -> Cost:
    """Reads the gradient, what was saved, x and the parameters; writes the gradients of x and of all parameters."""
    read = s.rows * (s.width_in + s.width_out) + s.projections * s.rows * s.width_out + s.lore_rows * s.rank
    read += parameter_count(s, s.used_experts, s.used_lores)
    written = s.rows * s.width_in + parameter_count(s, s.all_experts, s.all_lores)
    return Cost(2 * lore_flops(s), width * (read + written))


def move_rows(rows_read: int, rows_written: int, row_width: int, width: int) -> Cost:
    """Rows copied or summed."""
    return Cost(0.0, float(width * row_width * (rows_read + rows_written)))


def route(logits: int) -> Cost:
    """Float32 logits are read and probabilities written; back, probabilities are read and the logits' gradients written."""
    return Cost(0.0, 4.0 * 4 * logits)


def experts(s: Sizes, width: int, tokens: int, *, backward: bool) -> Cost:
    """The experts of a layer: hidden layer and down-projection. Tokens and parameters are read, the output is written; rows between them are not
    counted. Backward: the same operations twice; reads the gradient, tokens, what was saved and the parameters, writes all gradients."""
    down = Cost(2.0 * s.rows * s.width_in * s.width_out, 0)
    weights = parameter_count(s, s.used_experts, s.used_lores) + s.used_experts * s.width_in * s.width_out
    forward = Cost(lore_flops(s) + down.flops, width * (2 * tokens * s.width_in + weights))
    if not backward:
        return forward
    saved = s.rows * s.width_out * (s.projections + 1)
    gradients = parameter_count(s, s.all_experts, s.all_lores) + s.all_experts * s.width_in * s.width_out
    return Cost(3 * forward.flops, forward.bytes + width * (3 * tokens * s.width_in + weights + 2 * saved + gradients))
