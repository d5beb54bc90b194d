"""What an operation costs: its kind, its floating-point operations, the bytes that it reads and writes.

Shapes: R rows; D in; F out; N LoRE rows; Q LoRE rank; B batch; H heads; S length; d width of a head; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["matmul", "grouped", "attention", "memory"]
"""`matmul`: one dense product. `grouped`: the products of all experts or LoREs. `memory`: everything that is limited by the bytes it moves."""


class Work(NamedTuple):
    """One kernel of a process."""

    kind: Kind
    flops: float
    moved: int
    """Bytes read and written."""
    rows: int
    """Rows of the product that one weight meets; 0 for what is no product."""
    width: int
    """The smaller side of the weight; for attention that of a head."""
    wide: bool
    """Whether a product is in float32."""


VIEWS = frozenset(
    {"view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "expand", "detach", "split", "unbind", "alias", "permute", "as_strided"}
    | {"_unsafe_view", "chunk", "promote_types", "lift_fresh", "_reshape_alias", "empty", "new_empty", "empty_like", "split_with_sizes", "narrow"}
)
"""Operations that start no kernel."""


def work_of(func: Any, args: tuple[Any, ...], out: Any) -> Work | None:
    """The work of one call of an operator. None: it starts no kernel."""
    namespace, name = func._schema.name.split("::")
    if name in VIEWS:
        return None
    moved = sum(tensor.nbytes for tensor in _tensors((args, out)))
    if namespace == "neox":
        return _own(name, args, out, moved)
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    if packet in flop_registry:
        flops = float(flop_registry[packet](*args, out_val=out))
        left, right = [tensor for tensor in _tensors(args) if tensor.ndim >= 2][-2:]
        rows, inner, outer = sorted((left.shape[-2], left.shape[-1], right.shape[-1]), reverse=True)
        return Work("matmul", flops, moved, rows, min(inner, outer), left.dtype == torch.float32)
    return Work("memory", 0.0, moved, 0, 0, False)


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _own(name: str, args: tuple[Any, ...], out: Any, moved: int) -> Work:
    """Of the operators of `megatron.kernels`."""
    if name in ("attention", "attention_backward"):
        return _attention(name, args, moved)
    if name in ("grouped_lore", "grouped_lore_backward"):
        return _lore(name, args, moved)
    if name in ("grouped_gemm", "grouped_gemm_outer"):
        x_RD, other = args[0], args[1]
        groups = args[2].shape[0]
        flops = 2.0 * x_RD.shape[0] * x_RD.shape[1] * out.shape[-1]
        return Work("grouped", flops, moved, _per_group(x_RD.shape[0], groups), min(x_RD.shape[1], out.shape[-1]), other.dtype == torch.float32)
    return Work("memory", 0.0, moved, 0, 0, False)


def _attention(name: str, args: tuple[Any, ...], moved: int) -> Work:
    """Half of the S x S square is masked and not computed. The backward has five products in place of two (Dao, 2023, FlashAttention-2)."""
    backward = name.endswith("backward")
    parts, layout = (args[1], args[2]) if backward else (args[0], args[1])
    heads, _, dim = layout
    batch, length = (parts[0].shape[0], parts[0].shape[1]) if len(parts) == 1 else (parts[0].shape[0], parts[0].shape[2])
    flops = 4.0 * batch * heads * length * length * dim / 2 * (2.5 if backward else 1.0)
    return Work("attention", flops, moved, length, dim, parts[0].dtype == torch.float32)


def _lore(name: str, args: tuple[Any, ...], moved: int) -> Work:
    """The plain products and the LoREs' as one kernel; two thirds of a step's products are in the backward."""
    backward = name.endswith("backward")
    x_RD = args[0][1] if backward else args[0]
    rows_E, parts, there, choice = args[1], args[2], args[3], args[4]
    rows = x_RD.shape[0]
    lore_rows = choice[0].numel() if choice else rows
    present = iter(parts)
    places = [next(present) if is_there else None for is_there in there]
    flops = 0.0
    for weight, a, b in (places[0:3], places[4:7]):
        flops += 0.0 if weight is None else 2.0 * rows * weight.shape[1] * weight.shape[2]
        flops += 0.0 if a is None or b is None else 2.0 * lore_rows * a.shape[1] * (a.shape[2] + b.shape[2])
    width = min(side for part in parts if part.ndim == 3 for side in part.shape[1:]) if places[0] is places[4] is None else x_RD.shape[1]
    per_group = _per_group(rows, rows_E.shape[0])
    return Work("grouped", flops * (2.0 if backward else 1.0), moved, per_group, width, x_RD.dtype == torch.float32)


def _per_group(rows: int, groups: int) -> int:
    return max(1, rows // max(1, groups))
