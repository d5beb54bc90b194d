"""The learning-rate schedule in a checkpoint, under GPT-NeoX's names. Every checkpoint holds it, and a run that goes on from one compares it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.optimizer import OptimizerConfig
from megatron.config.section import ConfigError
from megatron.training.schedule import Schedule, learning_rate

log = logging.getLogger(__name__)

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
LENGTHS = ("warmup_steps", "wsd_decay_steps", "cooldown_steps", "constant_steps")
"""Shares of `decay_steps`."""
EQUAL = 1e-9
ADVICE = "Set override_lr_scheduler: true to follow this configuration from here on, or use_checkpoint_lr_scheduler: true to follow the checkpoint."


class ScheduleRecord:
    """DeepSpeed uses this object as its learning-rate scheduler. It counts the steps that were applied, and checkpoints hold it.

    The learning rates come from `learning_rate`.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.steps_done = 0
        self.loaded: Mapping[str, Any] | None = None
        """The schedule of the loaded checkpoint. None: no checkpoint was loaded, or it has no schedule."""

    def step(self) -> None:
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        fields = [field for field in NAMES if field in GPT_NEOX_FIELDS or getattr(self.schedule, field)]
        return {**{NAMES[field][0]: getattr(self.schedule, field) for field in fields}, "num_iters": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self.loaded = state


def schedule_to_follow(record: ScheduleRecord, config: OptimizerConfig, path: Path) -> Schedule:
    """The schedule of a run that goes on from the checkpoint at `path`, which `record` was loaded from.

    The configuration's schedule is used, and it must be the same as the checkpoint's. With `use_checkpoint_lr_scheduler` the checkpoint's is used
    without a comparison, with `override_lr_scheduler` the configuration's. A schedule that differs only in length (another `train_iters`) counts as
    the
    same if both give the next step the same rate, as constant schedules and constant parts do. Otherwise raises ConfigError, which names the
    differences. If the checkpoint has no schedule, the configuration's is used.
    """
    own, stored = record.schedule, record.loaded
    if not stored or config.override_lr_scheduler:
        return own
    there = _stored_schedule(stored, own, path)
    if there == own or config.use_checkpoint_lr_scheduler:
        return there
    only_longer = _stretched(there, own)
    if only_longer and math.isclose(*(learning_rate(schedule, record.steps_done) for schedule in (there, own)), rel_tol=EQUAL):
        log.info(
            "The learning-rate schedule now has %d steps; before it had %d. Both give the same learning rate up to here.",
            own.decay_steps,
            there.decay_steps,
        )
        return own
    different = [_difference(field, there, own) for field in NAMES if getattr(there, field) != getattr(own, field)]
    hint = f" {_advice_on_length(there)}" if only_longer else ""
    raise ConfigError([f"{path} was trained with another learning-rate schedule: {'; '.join(different)}.{hint} {ADVICE}"])


def _stretched(there: Schedule, own: Schedule) -> bool:
    """Whether the two differ in nothing but their length, as by another `train_iters`."""
    same = dataclasses.replace(there, decay_steps=own.decay_steps, **{field: getattr(own, field) for field in LENGTHS}) == own
    shares = zip(*([getattr(schedule, field) / schedule.decay_steps for field in LENGTHS] for schedule in (there, own)), strict=True)
    return same and all(math.isclose(*pair, rel_tol=EQUAL) for pair in shares)


def _advice_on_length(there: Schedule) -> str:
    """What to set where a run is only to be longer, and the rates of the steps that were taken would have been others."""
    after = "; the rate then rises again after these steps, as in GPT-NeoX" if there.style == "cosine" else ""
    return (
        "Only the length differs, which follows train_iters. With the new length, the steps so far would have had other learning rates. "
        f"Set lr_decay_iters: {there.decay_steps} to keep the schedule as it was{after}."
    )


def _stored_schedule(stored: Mapping[str, Any], own: Schedule, path: Path) -> Schedule:
    """What a checkpoint of any GPT-NeoX says. Where the style is the same, what is not stored is as configured here."""
    given = {field: stored[name] for field, (name, _) in NAMES.items() if name in stored}
    if given.get("style", own.style) == own.style:
        return dataclasses.replace(own, **given)
    if given["style"] not in GPT_NEOX_STYLES and not set(given) - set(GPT_NEOX_FIELDS):
        style = given["style"]
        raise ConfigError(
            [
                f"{path} does not hold its whole learning-rate schedule '{style}': give it in the configuration, with lr_decay_style: {style} and "
                "the keys of that style"
            ]
        )
    return Schedule(**{**{field: getattr(own, field) for field in GPT_NEOX_FIELDS}, **given})


def _difference(field: str, there: Schedule, own: Schedule) -> str:
    unit = " steps" if field.endswith("_steps") else ""
    return f"{NAMES[field][1]} is {getattr(there, field)}{unit} in the checkpoint and {getattr(own, field)}{unit} in the configuration"
