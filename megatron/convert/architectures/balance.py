"""The strength of the balance loss, there and back: what is added to the loss stays the same. docs/moe.md compares the definitions.

transformers has one loss for all layers, K where every expert is used evenly (K experts per token), times `router_aux_loss_coef`: our
`joint_load_balance`, so its coefficient is that number. Our other balance losses are 1 in each layer then, and are summed over the X layers with
experts: X / K times their coefficient gives the same strength where the layers are used alike. Where they are not, the two differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from megatron.config.moe import MoEConfig
from megatron.convert.architecture import Architecture, Source

COEFFICIENT, Z_COEFFICIENT = "router_aux_loss_coef", "router_z_loss_coef"
JOINT = "joint_load_balance"
BY_LAYER = ("load_balance", "sequence_load_balance", "global_load_balance")
"""Our balance losses that look at one layer at a time."""
NOT_IN_THE_CLASS = ("lore_balance", "neighbour_selection")
"""Losses that our own class for transformers does not compute."""


def balance_setting(source: Source) -> float:
    """`router_aux_loss_coef` of a class of transformers' own."""
    moe = source.config.moe
    by_layer = sum((_exact(moe.moe_losses.get(name, 0.0)) for name in BY_LAYER), Fraction(0))
    if not by_layer:
        return moe.moe_losses.get(JOINT, 0.0)
    layers = len(moe.moe_layer_numbers(source.config.model.num_layers))
    return float(_exact(moe.moe_losses.get(JOINT, 0.0)) + by_layer * layers / moe.top_k)


def balance_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`moe_losses` of a config.json whose class has `router_aux_loss_coef`; nothing where that is 0."""
    coefficient = settings.get(COEFFICIENT)
    return {"moe_losses": {JOINT: coefficient}} if coefficient else {}


def export_notices(source: Source, architecture: Architecture) -> Iterator[str]:
    """What the losses of a model become in an export, where that is not what they were."""
    moe, name = source.config.moe, architecture.class_name
    used = [loss for loss, coefficient in moe.moe_losses.items() if coefficient and moe.has_experts]
    settings = architecture.settings(source) if used else {}
    if "moe_losses" in settings:
        known: tuple[str, ...] = tuple(loss for loss in used if loss not in NOT_IN_THE_CLASS)
    else:
        known = (JOINT, *BY_LAYER) if COEFFICIENT in settings else ()
    if left := [loss for loss in used if loss not in known]:
        yield f"{name} does not compute {', '.join(left)}: if you train this export in transformers, these losses are not added."
    if COEFFICIENT in settings and (given := [f"{loss} {moe.moe_losses[loss]:g}" for loss in used if loss in BY_LAYER]):
        yield (
            f"moe_losses: {', '.join(given)} becomes {COEFFICIENT} {settings[COEFFICIENT]:g}. transformers takes one mean over all layers and counts "
            f"{moe.top_k} choices for each token. The loss has the same strength if all layers use their experts in the same way; "
            "otherwise it differs."
        )


def import_notices(settings: Mapping[str, Any], moe: MoEConfig) -> Iterator[str]:
    """What the losses of a config.json become, where a user should know of it."""
    if JOINT in moe.moe_losses and "moe_losses" not in settings and not settings.get("output_router_logits"):
        yield (
            f"Training adds the balance loss ({COEFFICIENT} {settings[COEFFICIENT]:g}, here moe_losses: {JOINT}). transformers adds the same loss, "
            "but only with output_router_logits: true, and this config.json does not have that. To train without the loss, write moe_losses: {}."
        )
    for key in (COEFFICIENT, Z_COEFFICIENT):
        coefficient = settings.get(key)
        read = "moe_losses" in settings or (key == COEFFICIENT and JOINT in moe.moe_losses)
        if coefficient and not read:
            yield (
                f"config.json has {key} {coefficient}. The class of this model in transformers does not read it, so no such loss is "
                "added here either."
            )


def _exact(coefficient: float) -> Fraction:
    """The number as it is written: 0.1 is a tenth."""
    return Fraction(repr(float(coefficient)))
