"""The learning-rate schedule in a checkpoint, under GPT-NeoX's names: written with each, compared when a run goes on from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.optimizer import OptimizerConfig
from megatron.config.section import ConfigError
from megatron.training.schedule import Schedule

# Schedule's field -> its name in a checkpoint's `lr_scheduler`, and the key that decides it. The first five are GPT-NeoX's.
NAMES: dict[str, tuple[str, str]] = {
    "peak": ("start_lr", "optimizer.params.lr"),
    "minimum": ("min_lr", "min_lr"),
    "warmup_steps": ("warmup_iter", "warmup"),
    "decay_steps": ("end_iter", "lr_decay_iters"),
    "style": ("decay_style", "lr_decay_style"),
    "wsd_decay_steps": ("wsd_decay_iter", "wsd_decay_ratio"),
    "constant_rate": ("constant_lr", "constant_lr"),
    "cooldown_steps": ("cooldown_iter", "cooldown_iters_perc"),
    "constant_steps": ("constant_iter", "constant_iters_perc"),
    "timescale": ("timescale", "timescale"),
}
GPT_NEOX_FIELDS = ("peak", "minimum", "warmup_steps", "decay_steps", "style")
GPT_NEOX_STYLES = ("constant", "linear", "cosine", "exponential")
ADVICE = "Set override_lr_scheduler: true to follow this configuration from here on, or use_checkpoint_lr_scheduler: true to follow the checkpoint."


class ScheduleRecord:
    """What DeepSpeed takes for its learning-rate scheduler: it counts the steps that were applied and travels through checkpoints.

    The rates themselves come from `learning_rate`.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.steps_done = 0
        self.loaded: Mapping[str, Any] | None = None
        """What the checkpoint that was loaded has; None when none was, or when it has no schedule."""

    def step(self) -> None:
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        fields = [field for field in NAMES if field in GPT_NEOX_FIELDS or getattr(self.schedule, field)]
        return {**{NAMES[field][0]: getattr(self.schedule, field) for field in fields}, "num_iters": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self.loaded = state


def schedule_to_follow(record: ScheduleRecord, config: OptimizerConfig, path: Path) -> Schedule:
    """The schedule of a run that goes on from the checkpoint at `path`, which `record` was loaded from.

    It is the configuration's, and has to be the checkpoint's as well: with `use_checkpoint_lr_scheduler` it is the checkpoint's, with
    `override_lr_scheduler` the configuration's. Raises ConfigError naming what differs when neither is set. A checkpoint without one is not compared.
    """
    own, stored = record.schedule, record.loaded
    if not stored or config.override_lr_scheduler:
        return own
    there = _stored_schedule(stored, own, path)
    if there != own and not config.use_checkpoint_lr_scheduler:
        different = [_difference(field, there, own) for field in NAMES if getattr(there, field) != getattr(own, field)]
        raise ConfigError([f"{path} was trained with another learning-rate schedule: {'; '.join(different)}. {ADVICE}"])
    return there


def _stored_schedule(stored: Mapping[str, Any], own: Schedule, path: Path) -> Schedule:
    """What a checkpoint of any GPT-NeoX says. Where the style is the same, what is not stored is as configured here."""
    given = {field: stored[name] for field, (name, _) in NAMES.items() if name in stored}
    if given.get("style", own.style) == own.style:
        return dataclasses.replace(own, **given)
    if given["style"] not in GPT_NEOX_STYLES and not set(given) - set(GPT_NEOX_FIELDS):
        style = given["style"]
        raise ConfigError(
            [f"{path} does not say all of its learning-rate schedule '{style}': give it here with lr_decay_style: {style} and its keys"]
        )
    return Schedule(**{**{field: getattr(own, field) for field in GPT_NEOX_FIELDS}, **given})


def _difference(field: str, there: Schedule, own: Schedule) -> str:
    unit = " steps" if field.endswith("_steps") else ""
    return f"{NAMES[field][1]} is {getattr(there, field)}{unit} there and {getattr(own, field)}{unit} here"
