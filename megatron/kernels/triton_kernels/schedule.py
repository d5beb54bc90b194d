"""Which rows a program of a grouped kernel works on. All of it is computed on the device: nothing waits for it.

Rows are sorted by group. A tile is `size` rows of one group, fewer at the group's end. How many tiles there are is known on the device only, so a
grid has as many programs as there can be, and those without a tile stop at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.kernels.grouped_gemm.reference import row_counts


class Schedule(NamedTuple):
    """Tiles of rows that are sorted by group."""

    group_P: Tensor
    """int32: the group of each program's tile; the number of groups where it has none."""
    first_P: Tensor
    """int64: the first row of each program's tile."""
    bounds_G1: Tensor
    """int64: where each group begins, and where the last one ends. Never below 0 and never above the number of rows."""
    size: int
    """Rows of a tile."""


def schedule(rows_G: Tensor, total: int, size: int) -> Schedule:
    """Tiles of at most `size` of `total` rows. The counts must have passed `check_counts`."""
    bounds_G1 = bounds(rows_G, total)
    tiles_G = (bounds_G1.diff() + size - 1) // size
    ends_G = tiles_G.cumsum(0)
    programs = torch.arange(-(-total // size) + len(rows_G), device=rows_G.device)
    group_P = torch.searchsorted(ends_G, programs, right=True)
    begins_G1 = torch.nn.functional.pad(ends_G, (1, 0))
    first_P = bounds_G1[group_P] + (programs - begins_G1[group_P]) * size
    return Schedule(group_P.to(torch.int32), first_P, bounds_G1, size)


def bounds(rows_G: Tensor, total: int) -> Tensor:
    """int64 [groups + 1]: where each group begins, and where the last one ends; within [0, total] and never falling, whatever the counts are."""
    return torch.nn.functional.pad(rows_G.to(torch.int64).clamp(min=0).cumsum(0), (1, 0)).clamp(max=total)


def check_counts(rows_G: Tensor, total: int) -> None:
    """The counts must be at least 0 and sum to `total`. Raises ValueError on a CPU. On a GPU nothing waits: the device reports it later."""
    if rows_G.dtype.is_floating_point or rows_G.dtype == torch.bool:
        raise ValueError(f"row counts of {rows_G.dtype}; they must be whole numbers")
    if rows_G.device.type == "cpu":
        row_counts(rows_G, total)
        return
    torch._assert_async((rows_G.sum() == total) & (rows_G >= 0).all(), f"row counts must be at least 0 and sum to the {total} rows")


def check_same(what: str, x: Tensor, **others: Tensor | None) -> None:
    """All tensors must have the dtype and the device of `x`. Raises ValueError that names the one that has not."""
    for name, t in others.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{what}: {name} is {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}; they must be the same")
