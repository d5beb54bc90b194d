"""Adam's state as GPT-NeoX saved it, in PyTorch's form.

Its fused Adams (apex, DeepSpeed) count steps once for a group where PyTorch counts them for each weight, and know fewer settings. Both go through the
weights in the same order, those that decay first, so that the n-th entry belongs to the n-th weight here as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError

AVERAGES = ("exp_avg", "exp_avg_sq")


def pytorch_form(stored: Mapping[str, Any], own_groups: list[dict[str, Any]], *, steps: int) -> dict[str, Any]:
    """`stored` with every setting that PyTorch's groups (`own_groups`) have, and a count of steps for each weight: the group's, else `steps`."""
    groups = [
        {**{key: value for key, value in own.items() if key != "params"}, **group}
        for own, group in zip(own_groups, stored["param_groups"], strict=True)
    ]
    counts = {index: float(group.get("step") or steps) for group in groups for index in group["params"]}
    state = {index: {"step": torch.tensor(counts[index]), **entry} for index, entry in stored["state"].items()}
    return {"state": state, "param_groups": groups}


def check_adam_state(path: Path, stored: Any, own_groups: list[dict[str, Any]]) -> None:
    """Raises CheckpointError unless `stored` holds both averages of every weight, in groups as large as `own_groups`."""
    groups: list[dict[str, Any]] | None = stored.get("param_groups") if isinstance(stored, dict) else None
    if (
        groups is None
        or not isinstance(stored.get("state"), dict)
        or [len(group["params"]) for group in groups] != [len(group["params"]) for group in own_groups]
    ):
        raise _refusal(path, "its groups of weights differ from those of Adam in this run")
    weights = [weight for group in own_groups for weight in group["params"]]
    for index, weight in zip((index for group in groups for index in group["params"]), weights, strict=True):
        entry = stored["state"].get(index, {})
        if any(name not in entry or entry[name].shape != weight.shape for name in AVERAGES):
            raise _refusal(path, f"its entry {index} does not hold Adam's two averages for a weight of shape {list(weight.shape)}")


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The optimizer's state in {path}, which another program wrote, cannot be read: {reason}. Add `-o no_load_optim=true` to continue from the "
        "weights with a new optimizer state."
    )
