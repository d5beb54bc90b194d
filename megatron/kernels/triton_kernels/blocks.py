"""Sizes of tiles, and how a kernel is started."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """The tile of a product [rows, depth] @ [depth, columns]. Powers of two, at least 16."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Loads in flight."""


def blocks_for(x: Tensor, rows: int, columns: int) -> Blocks:
    """A tile for groups of about `rows` rows and for `columns` columns, in the dtype of `x`.

    16-bit tiles are as large as an accumulator without spills allows. float32 products do not use tensor cores at full precision: small tiles.
    """
    if x.element_size() > 2:
        largest_rows, largest_columns, depth = (64, 32, 32) if x.element_size() == 4 else (32, 16, 16)
    else:
        largest_rows, largest_columns, depth = 128, 128, 64
    tall, wide = _power(rows, largest_rows), _power(columns, largest_columns)
    return Blocks(tall, wide, depth, 8 if tall * wide > 64 * 128 else 4, 3 if x.element_size() <= 2 else 2)


def average(rows: int, groups: int) -> int:
    """Rows of a group, if all had the same number."""
    return -(-rows // max(1, groups))


def precision(x: Tensor) -> str:
    """How float32 products are computed: as PyTorch's own setting says. Other dtypes have one way only."""
    return "tf32" if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts the kernel on the device of its first tensor; an empty grid starts nothing."""
    if 0 in grid:
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _power(number: int, largest: int) -> int:
    """The smallest power of two that is at least `number`, within [16, largest]."""
    return max(16, min(largest, 1 << max(0, number - 1).bit_length()))
