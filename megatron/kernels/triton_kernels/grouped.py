"""The grouped products as functions of tensors: allocate, choose tiles, launch. Importing this imports Triton.

Shapes: R rows sorted by group; K depth; N columns; G groups. A `Source` says which rows of a tensor stand in the groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from megatron.kernels.triton_kernels import products
from megatron.kernels.triton_kernels.blocks import average, blocks_for, cdiv, launch, precision
from megatron.kernels.triton_kernels.schedule import bounds, schedule


class Source(NamedTuple):
    """Row r of the groups is row `order[r] // choices` of `rows`; row r itself where `choices` is 0."""

    rows: Tensor
    order: Tensor | None = None
    choices: int = 0

    def height(self) -> int:
        """Rows in the groups."""
        return self.rows.shape[0] if self.order is None else self.order.shape[0]

    def pointers(self) -> tuple[Tensor, Tensor]:
        """What a kernel takes; the rows themselves in place of an order that it does not read."""
        return self.rows, self.rows if self.order is None else self.order


def accumulator(x: Tensor) -> Any:
    """The dtype of sums."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def matmul(source: Source, weight_GKN: Tensor, rows_G: Tensor) -> Tensor:
    """out_RN[r] = row r @ weight[group of r]; the weight has any strides."""
    x, order = source.pointers()
    rows, (groups, depth, columns) = source.height(), weight_GKN.shape
    out_RN = x.new_empty(rows, columns)
    blocks = blocks_for(x, average(rows, groups), columns)
    plan = schedule(rows_G, rows, blocks.rows)
    launch(
        products.matmul_kernel, (len(plan.group_P) if rows else 0, cdiv(columns, blocks.columns)),
        x, order, weight_GKN, out_RN, plan.group_P, plan.first_P, plan.bounds_G1, groups, x.shape[0], depth, columns, *weight_GKN.stride(),
        CHOICES=source.choices, BM=blocks.rows, BN=blocks.columns, BK=blocks.depth, PRECISION=precision(x), ACC=accumulator(x),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out_RN


def outer(left: Source, right: Source, rows_G: Tensor) -> Tensor:
    """out_GIJ[g] = left_g^T @ right_g, zero for a group without rows."""
    (x, x_order), (y, y_order) = left.pointers(), right.pointers()
    rows, groups, height, width = left.height(), rows_G.shape[0], x.shape[1], y.shape[1]
    out_GIJ = x.new_empty(groups, height, width)
    blocks = blocks_for(x, height, width)
    tiles_j = cdiv(width, blocks.columns)
    launch(
        products.outer_kernel, (groups, cdiv(height, blocks.rows) * tiles_j),
        x, x_order, y, y_order, out_GIJ, bounds(rows_G, rows), x.shape[0], y.shape[0], height, width, tiles_j,
        LEFT_CHOICES=left.choices, RIGHT_CHOICES=right.choices, BI=blocks.rows, BJ=blocks.columns, BR=min(32, blocks.depth),
        PRECISION=precision(x), ACC=accumulator(x), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out_GIJ


def sum_rows(x_RN: Tensor, rows_G: Tensor) -> Tensor:
    """out_GN[g] = sum of the rows of group g."""
    rows, columns = x_RN.shape
    out_GN = x_RN.new_empty(rows_G.shape[0], columns)
    launch(
        products.sum_rows_kernel, (rows_G.shape[0], cdiv(columns, 64)), x_RN, out_GN, bounds(rows_G, rows), columns,
        BR=32, BN=64, ACC=accumulator(x_RN), num_warps=4,
    )  # fmt: skip
    return out_GN
