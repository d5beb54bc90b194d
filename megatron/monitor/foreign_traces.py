"""Routing traces of other programs.

vLLM (`--enable-return-routed-experts`): an integer array [tokens, MoE layers, experts per token]. In Python it is `CompletionOutput.routed_experts`,
    kept with `numpy.save`; a server's answer holds it as `prompt_routed_experts` and, in each choice, `routed_experts` (documentation of vLLM 0.21).
Megatron-Core (`--moe-routing-trace-path`): router_trace_rank*.jsonl, a record for each step and layer, as its module `router_trace` writes it:
    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 128, "topk": 2, "top_indices": [[1, 5], ...]}

Shapes: T tokens; L layers with experts; K experts per token.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.disk import explained
from megatron.monitor.routing_trace import Numbers, Trace, TraceError, checked, read_trace

NPY = b"\x93NUMPY"


def read_any_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """A trace of ours, of vLLM or of Megatron-Core, as the file itself shows. `num_experts` None: as many as it names. Raises TraceError."""
    try:
        with path.open("rb") as file:
            start = file.read(len(NPY))
        if start.startswith(b"PK"):
            return read_trace(path)
        if start == NPY:
            return checked(vllm_trace([np.load(path, allow_pickle=False)], num_experts=num_experts, where=path), path)
        if path.suffix == ".jsonl":
            return checked(megatron_trace(path, num_experts=num_experts), path)
        return checked(vllm_trace(list(_arrays_of_response(path)), num_experts=num_experts, where=path), path)
    except TraceError:
        raise
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {explained(error, path)}.") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TraceError(f"{path} is no routing trace of this program, vLLM (.npy, .json) or Megatron-Core (.jsonl): {reason}.") from error


def vllm_trace(parts: list[Numbers], *, num_experts: int | None, where: Path) -> Trace:
    """One array: each token is a step. Two: the prompt, which is one step, and the answer."""
    expert_TLK = np.concatenate(parts).astype(np.int64)
    if expert_TLK.ndim != 3 or not len(expert_TLK):
        raise TraceError(f"{where}: an array of shape {list(expert_TLK.shape)}; routed experts are [tokens, layers, experts per token].")
    prompt = len(parts[0]) if len(parts) > 1 else 1
    step_T = np.maximum(np.arange(len(expert_TLK), dtype=np.int64) - (prompt - 1), 0)
    return Trace(step_T, list(range(expert_TLK.shape[1])), expert_TLK, _count(expert_TLK, num_experts))


def megatron_trace(path: Path, *, num_experts: int | None) -> Trace:
    """The decoder's layers; records of several micro-batches of a step follow each other."""
    records: dict[int, dict[int, list[list[int]]]] = defaultdict(lambda: defaultdict(list))
    for record in _lines(path):
        if record.get("block", "decoder") == "decoder":
            records[int(record["layer"])][int(record["step"])] += record["top_indices"]
    layers = sorted(records)
    if not layers:
        raise TraceError(f"{path} holds no record of a decoder layer.")
    steps = sorted(records[layers[0]])
    lengths = [len(records[layers[0]][step]) for step in steps]
    if any([len(records[layer].get(step, [])) for step in steps] != lengths for layer in layers):
        raise TraceError(f"{path}: its layers do not hold the same tokens in every step. Record whole steps.")
    by_layer = [np.array([row for step in steps for row in records[layer][step]], np.int64) for layer in layers]
    expert_TLK = np.stack(by_layer, 1)
    return Trace(np.repeat(np.array(steps, np.int64), lengths), layers, expert_TLK, _count(expert_TLK, num_experts))


def _count(expert_TLK: Numbers, num_experts: int | None) -> int:
    return int(expert_TLK.max()) + 1 if num_experts is None else num_experts


def _arrays_of_response(path: Path) -> Iterator[Numbers]:
    """The prompt's array, where there is one, and the first choice's."""
    content = json.loads(path.read_text())
    if content.get("prompt_routed_experts") is not None:
        yield np.array(content["prompt_routed_experts"], np.int64)
    yield np.array(content["choices"][0]["routed_experts"], np.int64)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise TraceError(f"{path}:{number} is no JSON: {error}.") from error
