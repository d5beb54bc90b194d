"""The component registries. Each is a plain dictionary: the key is the name in the YAML, and the value is a class or "package.module:Class". Such
a class is imported when it is first used.

Adding a component is one line, from inside or outside the package: `ROUTERS["toy"] = ToyRouter`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

ROUTERS: dict[str, Any] = {
    "topk": "megatron.model.moe.routers.topk:TopKRouter",
    "sinkhorn": "megatron.model.moe.routers.sinkhorn:SinkhornRouter",
    "sigmoid": "megatron.model.moe.routers.sigmoid:SigmoidRouter",
    "top_p": "megatron.model.moe.routers.top_p:TopPRouter",
    "expert_choice": "megatron.model.moe.routers.expert_choice:ExpertChoiceRouter",
    "quantile_balancing": "megatron.model.moe.routers.quantile_balancing:QuantileBalancingRouter",
    "expert_threshold": "megatron.model.moe.routers.expert_threshold:ExpertThresholdRouter",
    "document_pool": "megatron.model.moe.routers.document_pool:DocumentPoolRouter",
    "recurrent": "megatron.model.moe.routers.recurrent:RecurrentRouter",
    "smoe_dropout": "megatron.model.moe.routers.smoe_dropout:SMoEDropoutRouter",
}
EXPERTS: dict[str, Any] = {
    "grouped": "megatron.model.moe.experts.grouped:GroupedExperts",
    "structmoe": "megatron.model.moe.experts.structmoe:build_structmoe",
    "decomposed": "megatron.model.moe.experts.decomposed:DecomposedExperts",
}
DISPATCHERS: dict[str, Any] = {
    "local": "megatron.model.moe.dispatch.local:LocalDispatcher",
    "library": "megatron.model.moe.dispatch.library:LibraryDispatcher",
}
LOSSES: dict[str, Any] = {
    "load_balance": "megatron.model.moe.losses.load_balance:load_balance_loss",
    "sequence_load_balance": "megatron.model.moe.losses.load_balance:sequence_load_balance_loss",
    "global_load_balance": "megatron.model.moe.losses.load_balance:global_load_balance_loss",
    "heterogeneous_load_balance": "megatron.model.moe.losses.heterogeneous_load_balance:heterogeneous_load_balance_loss",
    "joint_load_balance": "megatron.model.moe.losses.load_balance:joint_load_balance_loss",
    "block_wise_selection": "megatron.model.moe.losses.block_wise_selection:block_wise_selection_loss",
    "neighbour_selection": "megatron.model.moe.losses.neighbour_selection:neighbour_selection_loss",
    "lore_balance": "megatron.model.moe.losses.lore_balance:lore_balance_loss",
    "entropy": "megatron.model.moe.losses.entropy:router_entropy_loss",
    "z_loss": "megatron.model.moe.losses.z_loss:router_z_loss",
}


class UnknownComponent(ValueError):
    """A name that is not in the registry. The message lists the known names and suggests the nearest one."""


def resolve_component(registry: Mapping[str, Any], name: str) -> Any:
    """The class or function registered under `name`; a "module:attribute" entry is imported now.

    Raises `UnknownComponent` for a name that is not there, and for an entry that does not lead to anything.
    """
    check_known(registry, name)
    entry = registry[name]
    if not isinstance(entry, str):
        return entry
    try:
        return load_component(entry)
    except AttributeError as error:
        module_name, _, attribute = entry.partition(":")
        raise UnknownComponent(f"'{name}' is registered as '{entry}', but {module_name} has no '{attribute}'") from error


def load_component(entry: str) -> Any:
    """What "package.module:Class" names, imported now. Raises AttributeError where the module has no such name."""
    module_name, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def check_known(registry: Mapping[str, Any], name: str) -> None:
    """Raises `UnknownComponent` unless the registry has `name`; imports nothing."""
    if name not in registry:
        raise UnknownComponent(f"unknown name '{name}'{did_you_mean(name, registry)}; known: {', '.join(sorted(registry))}")


_SAME_THING = {"bf16": "bfloat16", "float16": "fp16", "half": "fp16", "float32": "fp32"}  # same meaning, other letters


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or nothing when none is near."""
    by_folded = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    if (same := _SAME_THING.get(name.lower())) in by_folded:
        return f"; did you mean '{same}'?"
    close = difflib.get_close_matches(name.lower().replace("-", "_"), by_folded, n=1, cutoff=0.65)
    return f"; did you mean '{by_folded[close[0]]}'?" if close else ""
