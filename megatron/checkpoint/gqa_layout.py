"""Which of two orders the rows of a grouped-query projection are in, and the older one brought into today's.

GPT-NeoX lays the rows of `query_key_value` out as all queries, all keys, all values (of one tensor-parallel process). Until November 2024 it cut them
up query head by query head instead: for each of them its d query rows, then d*K/H rows of the keys and as many of the values, both taken in order
(H query heads, K key heads of d dimensions). Its checkpoints do not say which; ours do.

Rows of queries, keys and values differ in length in every trained model, so the order in which rows of one kind lie together is the right one: how
much of the variance of the rows' lengths (their logarithms) lies between the three kinds tells the two orders apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.shards import query_key_value_parts

READ = "The rows of its grouped query/key/value projections are read"
FUSED = ".attention.query_key_value."
CLEAR_SHARE, CLEAR_CHI2, CLEAR_RATIO = 0.01, 20.0, 1.5
"""A decision needs this share of the variance between the kinds, more than chance gives (of R rows 2 / R; this over R once in 20,000 times), and so
many times as much as the other order gives."""


class Ordered(NamedTuple):
    """Weights in today's order, and a sentence on how that was decided; None where there was nothing to decide. `layout`: what was found."""

    shards: list[dict[str, Tensor]]
    notice: str | None
    layout: str = "q,k,v"


def todays_order(shards: Sequence[Mapping[str, Tensor]], *, heads: int, layout: str) -> Ordered:
    """The weights of each tensor-parallel process of another program's checkpoint in today's order.

    `heads`: query heads of one process. `layout`: `q,k,v`, `per_head`, or `auto`, which looks at the weights and takes q,k,v where they do not tell.
    Raises CheckpointError when the rows do not fit that many heads.
    """
    grouped = [(shard, name, sizes) for shard in shards for name in shard if FUSED in name and len(sizes := query_key_value_parts(shard, name)) == 3]
    if not grouped:
        return Ordered([dict(shard) for shard in shards], None)
    for shard, name, (queries, keys, _) in grouped:
        if queries % heads or keys % heads:
            raise CheckpointError(f"{name} of shape {list(shard[name].shape)} cannot be the query/key/value projection of {heads} query heads.")
    chosen, reason = (layout, "gqa_layout says so") if layout != "auto" else _look([(s[n], z) for s, n, z in grouped if s[n].ndim == 2], heads)
    if chosen == "q,k,v":
        return Ordered([dict(shard) for shard in shards], f"{READ} as all queries, all keys, all values: {reason}.")
    converted = [{name: _from_per_head(shard[name], sizes, heads) for owner, name, sizes in grouped if owner is shard} for shard in shards]
    ordered = [{**shard, **changes} for shard, changes in zip(shards, converted, strict=True)]
    return Ordered(ordered, f"{READ} head by head, as GPT-NeoX had them until November 2024: {reason}.", chosen)


def _look(weights: list[tuple[Tensor, list[int]]], heads: int) -> tuple[str, str]:
    """The order, and the reason."""
    now = sum(_share_between_kinds(weight, sizes) for weight, sizes in weights) / len(weights)
    then = sum(_share_between_kinds(_from_per_head(weight, sizes, heads), sizes) for weight, sizes in weights) / len(weights)
    clear = max(CLEAR_SHARE, CLEAR_CHI2 / weights[0][0].shape[0])
    shares = f"{then:.1%} of the variance of their lengths lies between the three kinds in the older order, {now:.1%} in today's"
    if then >= clear and then >= CLEAR_RATIO * now:
        return "per_head", shares
    if now >= clear and now >= CLEAR_RATIO * then:
        return "q,k,v", shares
    return "q,k,v", f"the weights do not show the order ({shares}); if the text of the model makes no sense, load it with `-o gqa_layout=per_head`"


def _share_between_kinds(rows_RD: Tensor, sizes: list[int]) -> float:
    """Variance of the mean of each kind over the variance of all, of the logarithms of the rows' lengths."""
    length_R = rows_RD.float().norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).log()
    means = torch.cat([part.mean().expand(size) for part, size in zip(length_R.split(sizes), sizes, strict=True)])
    return float(means.var(correction=0) / length_R.var(correction=0).clamp(min=torch.finfo(torch.float32).tiny))


def _from_per_head(rows_R: Tensor, sizes: list[int], heads: int) -> Tensor:
    """[q; k; v] from the order head by head; R = H * (d + 2 d K/H) rows, with or without columns."""
    per_head = rows_R.unflatten(0, (heads, -1)).split([size // heads for size in sizes], 1)
    return torch.cat([part.flatten(0, 1) for part in per_head])
