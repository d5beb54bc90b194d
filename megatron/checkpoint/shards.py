"""How the weights are cut up among tensor-parallel processes: one table, read in both directions.

GPT-NeoX's column-parallel layers are cut along dimension 0 (their outputs), row-parallel ones along dimension 1 (their inputs); where several
matrices are packed into one (query, key and value of grouped-query attention; up and gate of a gated MLP), each of them. Everything else is the same
on every process. What is packed shows in the shapes: the inputs of `attention.dense` are the queries, those of `mlp.linear2` the MLP's width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """What happens to the weights whose name ends in `ending` (a regular expression).

    `dim`: the dimension that is cut; None: every process has the whole. `parts`: the sizes along `dim` of the matrices packed into a weight, each cut
    by itself; None: it is one. `added`: with parallel residuals the processes' copies are all added to the stream, so that the whole is their sum.
    """

    ending: str
    dim: int | None
    parts: Callable[[State, str], list[int]] | None = None
    added: bool = False


class Merged(NamedTuple):
    """The whole weights, and sentences on what was decided on the way."""

    state: dict[str, Tensor]
    notices: tuple[str, ...]


def query_key_value_parts(state: State, name: str) -> list[int]:
    """One part with as many key as query heads, whose rows lie head by head as (q, k, v); else all queries, all keys, all values."""
    rows, queries = state[name].shape[0], _inputs_of_neighbour(state, name, "dense.weight")
    if rows == 3 * queries:
        return [rows]
    keys, odd = divmod(rows - queries, 2)
    if odd or not 0 < keys < queries:
        raise CheckpointError(
            f"{name} has {rows} rows and attention.dense {queries} inputs. This is neither query, key and value of {queries} rows each nor "
            "grouped-query attention."
        )
    return [queries, keys, keys]


def linear1_parts(state: State, name: str) -> list[int]:
    """One part without a gate, [up ; gate] with one."""
    rows, width = state[name].shape[0], _inputs_of_neighbour(state, name, "linear2.weight")
    if rows not in (width, 2 * width):
        raise CheckpointError(
            f"{name} has {rows} rows and linear2 {width} inputs. It must have as many rows as linear2 has inputs, or twice as many with a gate."
        )
    return [width] * (rows // width)


RULES = (
    Rule(r"\.experts\..+", dim=0),
    Rule(r"\.router\..+|\.latent\..+|\.zero_computation\..+|\.beside\.\d+\.(gate|coefficient)\..+", dim=None),
    Rule(r"\.word_embeddings\.weight|\.final_linear\.(weight|bias)", dim=0),
    Rule(r"\.position_embeddings\.weight", dim=None),
    Rule(r"norm\.(weight|bias|scale|g)", dim=None),
    Rule(r"\.attention\.query_key_value\.(weight|bias)", dim=0, parts=query_key_value_parts),
    Rule(r"\.attention\.dense\.weight", dim=1),
    Rule(r"\.attention\.dense\.bias", dim=None, added=True),
    Rule(r"\.attention\.rpe\.weight", dim=1),
    Rule(r"\.linear1\.(weight|bias)", dim=0, parts=linear1_parts),
    Rule(r"\.linear2\.weight", dim=1),
    Rule(r"\.linear2\.bias", dim=None, added=True),
)
"""The first one that fits a name decides."""
WHOLE = Rule("", dim=None)


def rule_for(name: str) -> Rule:
    """The rule for a weight (`sequential.2.mlp.linear1.weight`). Raises CheckpointError for a name that none knows."""
    for rule in RULES:
        if re.search(f"(?:{rule.ending})$", name):
            return rule
    raise CheckpointError(f"{name}: this program does not know how tensor-parallel processes divide this weight.")


def merge_shards(shards: Sequence[State], *, parallel_residual: bool) -> Merged:
    """The whole weights from those of each tensor-parallel process, in the order of the ranks. One process's are returned as they are.

    What is the same on every process is taken from the first; where training let the copies drift apart (norms, biases of row-parallel layers) it is
    their mean, and a notice says how far apart they were. `parallel_residual` (`gpt_j_residual`): those biases are added up. Raises CheckpointError.
    """
    if len(shards) == 1:
        return Merged(dict(shards[0]), ())
    _check_alike(shards)
    merged: dict[str, Tensor] = {}
    apart: dict[str, float] = {}
    for name in shards[0]:
        rule, copies = rule_for(name), [shard[name] for shard in shards]
        if rule.dim is not None:
            pieces = [copy.split(_sizes(rule, rule.dim, name, shard), rule.dim) for copy, shard in zip(copies, shards, strict=True)]
            merged[name] = torch.cat([piece for part in zip(*pieces, strict=True) for piece in part], rule.dim)
        elif rule.added and parallel_residual:
            merged[name] = torch.stack([copy.float() for copy in copies]).sum(0).to(copies[0].dtype)
        else:
            merged[name], apart[name] = _agreed(name, copies)
    return Merged(merged, _drift_notice({name: distance for name, distance in apart.items() if distance}))


def split_state(state: State, count: int, *, parallel_residual: bool) -> list[dict[str, Tensor]]:
    """The weights of each of `count` tensor-parallel processes: what `merge_shards` puts together again. Raises CheckpointError."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in state.items():
        rule = rule_for(name) if count > 1 else WHOLE
        pieces = [tensor] * count
        if rule.dim is not None:
            pieces = _cut(rule, rule.dim, name, state, count)
        elif rule.added and parallel_residual:
            pieces = [tensor / count] * count
        elif count > 1:
            _check_flat(name, tensor)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece
    return shards


def _cut(rule: Rule, dim: int, name: str, state: State, count: int) -> list[Tensor]:
    sizes = _sizes(rule, dim, name, state)
    if any(size % count for size in sizes):
        raise CheckpointError(f"{name} of shape {list(state[name].shape)} cannot be divided into {count} equal parts along dimension {dim}.")
    chunks = [part.chunk(count, dim) for part in state[name].split(sizes, dim)]
    return [torch.cat(pieces, dim) for pieces in zip(*chunks, strict=True)]


def _sizes(rule: Rule, dim: int, name: str, state: State) -> list[int]:
    shape = list(state[name].shape)
    if len(shape) <= dim:
        raise CheckpointError(f"{name} of shape {shape} has no dimension {dim}, along which it must be divided.")
    return [shape[dim]] if rule.parts is None else rule.parts(state, name)


def _inputs_of_neighbour(state: State, name: str, neighbour: str) -> int:
    """Columns of a weight of the same module: x.attention.dense.weight for x.attention.query_key_value.bias."""
    other = ".".join([*name.split(".")[:-2], neighbour])
    if other not in state or state[other].ndim != 2:
        raise CheckpointError(f"{name} cannot be divided, because the checkpoint does not hold {other}, whose shape is needed for that.")
    return state[other].shape[1]


def _agreed(name: str, copies: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The one value, and how far the copies are apart."""
    _check_flat(name, copies[0])
    if all(torch.equal(copy, copies[0]) for copy in copies[1:]):
        return copies[0], 0.0
    stacked = torch.stack([copy.float() for copy in copies])
    return stacked.mean(0).to(copies[0].dtype), float((stacked.amax(0) - stacked.amin(0)).max())


def _check_flat(name: str, tensor: Tensor) -> None:
    """GPT-NeoX's norms on queries and keys take all heads of a process together, so that the model depends on how many there are."""
    if "norm." in name and tensor.ndim > 1:
        raise CheckpointError(
            f"{name} of shape {list(tensor.shape)} normalises over all heads of a process, so it can be neither merged nor divided."
        )


def _drift_notice(apart: Mapping[str, float]) -> tuple[str, ...]:
    if not apart:
        return ()
    furthest = max(apart, key=lambda name: apart[name])
    return (
        f"{len(apart)} weights have a copy in every tensor-parallel process, and the copies differ (by up to {apart[furthest]:.2g}, in {furthest}): "
        "the mean of the copies is used.",
    )


def _check_alike(shards: Sequence[State]) -> None:
    for rank, shard in enumerate(shards):
        if different := sorted(set(shard) ^ set(shards[0])):
            raise CheckpointError(f"tensor-parallel ranks 0 and {rank} do not hold the same weights: only one of them holds {different[0]}.")
    for name in shards[0]:
        shapes = [list(shard[name].shape) for shard in shards]
        if any(shape != shapes[0] for shape in shapes):
            raise CheckpointError(f"{name} has different shapes on the tensor-parallel ranks: {', '.join(map(str, shapes))}.")
