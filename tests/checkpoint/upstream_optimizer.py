"""Optimizer state as GPT-NeoX's processes write it with DeepSpeed, cut up by a few lines of their own rather than by the code that is tested.

Two groups: weights that decay, then biases and norms. Every tensor-parallel process has its parts of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]
AVERAGES = ("exp_avg", "exp_avg_sq")


def grouped(names: Sequence[str]) -> list[list[str]]:
    """The names of each group of the optimizer."""
    plain = [name for name in names if name.endswith("bias") or "norm" in name]
    return [[name for name in names if name not in plain], plain]


def flat_parts(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """The tensors one after the other, filled up with zeros to 2 * count, in `count` equal parts."""
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    length = math.ceil(flat.numel() / (2 * count)) * 2 * count
    return list(torch.cat([flat, torch.zeros(length - flat.numel())]).chunk(count))


class Zero(NamedTuple):
    """How ZeRO 1 or 2, or the BF16 optimizer (`prefix`), writes. `list_form`: as with `elastic_checkpoint`, without what fills the last part up."""

    replicas: int
    prefix: str = ""
    steps: int = 7
    list_form: bool = False


def write_zero(path: Path, process: int, kinds: Mapping[str, State], zero: Zero) -> list[dict[str, Any]]:
    """The files of one process of a model, one for each replica. `kinds`: `master` and the averages by name. Returns `param_shapes`."""
    replicas = zero.replicas
    groups = grouped(list(kinds["master"]))
    for replica in range(replicas):
        state: dict[int, dict[str, Any]] = {}
        masters = []
        for number, names in enumerate(groups):
            parts = {kind: flat_parts([kinds[kind][name] for name in names], replicas)[replica] for kind in ("master", *AVERAGES)}
            left = sum(kinds["master"][name].numel() for name in names) - replica * parts["master"].numel()
            masters.append(parts["master"][: max(0, left)].clone())
            cut = {kind: parts[kind][: max(0, left)].clone() if zero.list_form else parts[kind].clone() for kind in AVERAGES}
            state[number] = {"step": torch.tensor(float(zero.steps)), **cut}
        base: Any = (
            list(state.values()) if zero.list_form else {"state": state, "param_groups": [{"params": [number]} for number in range(len(groups))]}
        )
        content = {"base_optimizer_state": base, "single_partition_of_fp32_groups": masters, "partition_count": [replicas] * len(groups)}
        torch.save(
            {"optimizer_state_dict": content, "ds_version": "0.16.5"},
            path / f"{zero.prefix}zero_pp_rank_{replica}_mp_rank_{process:02d}_optim_states.pt",
        )
    return [{name: kinds["master"][name].shape for name in names} for names in groups]


def numbered(kinds: Mapping[str, State], *, steps: int, form: str) -> dict[str, Any]:
    """ZeRO 0: `optimizer` of a model file. `form`: `plain` for fp32; for 16 bits `copies` has each weight's copy in float32, `flat` one tensor a
    group."""
    groups = grouped(list(kinds["exp_avg"]))
    state: dict[int, dict[str, Any]] = {}
    numbers: list[list[int]] = []
    for names in groups:
        numbers.append([])
        entries = [{kind: torch.cat([kinds[kind][name].reshape(-1) for name in names]) for kind in AVERAGES}] if form == "flat" else []
        for entry in entries or [{kind: kinds[kind][name] for kind in AVERAGES} for name in names]:
            numbers[-1].append(len(state))
            state[len(state)] = entry
    inner = {"state": state, "param_groups": [{"params": indices, "step": steps} for indices in numbers]}
    if form == "plain":
        return inner
    if form == "copies":
        return {"optimizer_state_dict": inner, "fp32_groups": [[kinds["master"][name] for name in names] for names in groups]}
    flat = [torch.cat([kinds["master"][name].reshape(-1) for name in names]) for names in groups]
    return {"dynamic_loss_scale": True, "cur_scale": 1024.0, "cur_iter": 7, "optimizer_state_dict": inner, "fp32_groups_flat": flat}
