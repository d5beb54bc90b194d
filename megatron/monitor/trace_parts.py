"""A trace in parts: what the processes of one run wrote, each its own tokens (replicas) or its own layers (stages of a pipeline).

Ours: `data_000_stage_00.npz` in a folder for each step.   Megatron-Core's: `router_trace_rank*.jsonl` in one folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.monitor.foreign_traces import read_any_trace
from megatron.monitor.routing_trace import Trace, TraceError

OURS, MEGATRON = "data_*_stage_*.npz", "router_trace*.jsonl"


def part_name(replica: int, stage: int) -> str:
    """The file of one process."""
    return f"data_{replica:03d}_stage_{stage:02d}.npz"


def step_folder(step: int) -> str:
    """The folder of one step's files."""
    return f"step_{step:08d}"


def read_parts(folder: Path, *, num_experts: int | None = None) -> Trace | None:
    """The whole trace of a folder. None: it holds no parts. Raises TraceError for parts that do not belong together."""
    files = sorted(folder.glob(OURS)) or sorted(folder.glob(MEGATRON))
    if not files:
        if steps := sorted(folder.glob("step_*/")):
            raise TraceError(f"{folder} holds a folder for each traced step. Give one of them, such as {steps[-1]}.")
        return None
    stages: dict[tuple[int, ...], list[Trace]] = {}
    for file in files:
        trace = read_any_trace(file, num_experts=num_experts)
        stages.setdefault(tuple(trace.layers), []).append(trace)
    wholes = [in_a_row(parts, folder) for parts in stages.values()]
    return side_by_side(wholes, folder)


def read_whole(path: Path, *, num_experts: int | None = None) -> Trace:
    """The trace of a file, or of a folder with the parts of one step. Raises TraceError."""
    trace = read_parts(path, num_experts=num_experts) if path.is_dir() else read_any_trace(path, num_experts=num_experts)
    if trace is None:
        raise TraceError(f"{path} holds no parts of a trace ({OURS} or {MEGATRON}). Give a trace file, or the folder of one step.")
    return trace


def in_a_row(parts: Sequence[Trace], where: Path) -> Trace:
    """Traces of the same layers and other tokens, one after the other. Raises TraceError."""
    first = parts[0]
    if any(part.expert_TLK.shape[2] != first.expert_TLK.shape[2] or list(part.domains) != list(first.domains) for part in parts):
        raise TraceError(f"{where}: the parts of the trace do not have the same experts per token. They are not of one run and step.")
    starts = np.cumsum([0, *(1 + int(_sequences(part).max()) for part in parts)])
    pieces = {token: text for part in parts for token, text in (part.pieces or {}).items()}
    return first._replace(
        step_T=np.concatenate([part.step_T for part in parts]),
        expert_TLK=np.concatenate([part.expert_TLK for part in parts]),
        num_experts=max(part.num_experts for part in parts),
        lore_TLKM=_together([part.lore_TLKM for part in parts]),
        weight_TLK=_together([part.weight_TLK for part in parts]),
        token_T=_together([part.token_T for part in parts]),
        sequence_T=np.concatenate([_sequences(part) + start for part, start in zip(parts, starts, strict=False)]),
        domain_T=_together([part.domain_T for part in parts]),
        experts_L=None if first.experts_L is None else [max(counts) for counts in zip(*(part.experts_by_layer for part in parts), strict=True)],
        pieces=pieces or None,
    )


def side_by_side(parts: Sequence[Trace], where: Path) -> Trace:
    """Traces of the same tokens and other layers together, by the numbers of the layers. Raises TraceError."""
    if len(parts) == 1:
        return parts[0]
    layers = [layer for part in parts for layer in part.layers]
    if len({part.tokens for part in parts}) > 1 or len(set(layers)) != len(layers):
        raise TraceError(f"{where}: the parts of the trace do not hold the same tokens in every layer. Record whole steps, each in its own folder.")
    order = np.argsort(layers)
    named = next((part for part in parts if part.token_T is not None), parts[0])
    width = max(part.expert_TLK.shape[2] for part in parts)
    lores = max(0 if part.lore_TLKM is None else part.lore_TLKM.shape[3] for part in parts)
    return named._replace(
        layers=sorted(layers),
        expert_TLK=np.concatenate([_wide(part.expert_TLK, (width,), -1) for part in parts], 1)[:, order],
        num_experts=max(part.num_experts for part in parts),
        lore_TLKM=None if not lores else np.concatenate([_lores(part, (width, lores)) for part in parts], 1)[:, order],
        num_lores=max(part.num_lores for part in parts),
        weight_TLK=None
        if any(part.weight_TLK is None for part in parts)
        else np.concatenate([_wide(part.weight_TLK, (width,), 0) for part in parts], 1)[:, order],
        experts_L=[count for _, count in sorted(zip(layers, (count for part in parts for count in part.experts_by_layer), strict=True))],
    )


def _sequences(part: Trace) -> npt.NDArray[np.int64]:
    return np.zeros(part.tokens, np.int64) if part.sequence_T is None else part.sequence_T


def _together(parts: Sequence[npt.NDArray[Any] | None]) -> npt.NDArray[Any] | None:
    """None: one of the parts is not known."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _wide(values: Any, sizes: tuple[int, ...], empty: float) -> npt.NDArray[Any]:
    """With room for more choices, which are empty."""
    room = [(0, 0)] * (values.ndim - len(sizes)) + [(0, size - have) for size, have in zip(sizes, values.shape[-len(sizes) :], strict=True)]
    return np.pad(values, room, constant_values=empty)


def _lores(part: Trace, sizes: tuple[int, int]) -> npt.NDArray[Any]:
    found = np.full((*part.expert_TLK.shape, 1), -1, np.int64) if part.lore_TLKM is None else part.lore_TLKM
    return _wide(found, sizes, -1)
