"""The learning rate as a pure function of the number of completed steps (NeoX's AnnealingLR)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.neox import NeoXConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up is a share of `decay_steps` and is not rounded, as in NeoX."""

    peak: float
    minimum: float
    decay_steps: int
    warmup_steps: float
    style: str


def schedule_of(config: NeoXConfig) -> Schedule:
    """The schedule that a configuration asks for. It must have a learning rate and a number of steps (see check_trainable)."""
    peak, steps = config.optimizer.optimizer.params.lr, config.lr_decay_iters
    assert peak is not None
    assert steps is not None
    return Schedule(
        peak=peak,
        minimum=config.optimizer.min_lr,
        decay_steps=steps,
        warmup_steps=config.optimizer.warmup * steps,
        style=config.optimizer.lr_decay_style,
    )


def learning_rate(schedule: Schedule, steps_done: int) -> float:
    """The rate of the step that follows `steps_done` completed ones.

    Linear warm-up from below `minimum` if need be, then constant, linear or cosine down to it. As in NeoX the cosine is not clamped at its end:
    it rises again when training goes on longer than `decay_steps`. A warm-up of less than one step stays at the peak, which NeoX's exceeds.
    """
    peak, minimum, warmup = schedule.peak, schedule.minimum, schedule.warmup_steps
    if warmup > 0 and steps_done <= warmup:
        return peak * min(1.0, max(1, steps_done) / warmup)
    done, total = steps_done - warmup, schedule.decay_steps - warmup
    if schedule.style == "constant" or total <= 0:
        return max(minimum, peak)
    if schedule.style == "linear":
        return max(minimum, peak * (total - done) / total)
    return max(minimum, minimum + (peak - minimum) / 2 * (math.cos(math.pi * done / total) + 1))
