"""The learning rate as a pure function of the number of completed steps: GPT-NeoX's AnnealingLR, and what its users added to it.

n steps are done, W = warmup * D warm up (not rounded), D are the decay steps, k = n - W, E = D - W. For n <= W the rate is peak * max(1, n) / W;
after that it is the style's, and never below the minimum:

    constant    peak
    linear      peak * (E - k) / E
    cosine      minimum + (peak - minimum) / 2 * (cos(pi k / E) + 1)            not clamped: it rises again when training goes on after D
    exponential peak * exp(-0.693 k / E)                                        half of the peak at D
    wsd         peak until D - R, R = wsd_decay_ratio * D, then minimum + (peak - minimum) / 2 * (cos(pi (n - D + R) / R) + 1), and minimum after D
    infinite_*  C = cooldown_iters_perc * D, H = constant_iters_perc * D, A = E - C - H, level = constant_lr:
                k <= C          a cooldown from the peak to the level
                k <= C + H      level
                after that      level * (minimum / level) ** ((k - C - H) / A), and minimum after D; level for ever if A is less than a step
                cooldown of infinite_cosine     level + (peak - level) / 2 * (cos(pi k / C) + 1)
                cooldown of infinite_inv_sqrt   peak + (level - peak) * f(k / C) / f(1), f(t) = 1 / sqrt(1 + timescale t) - 1

Sources: wsd is MiniCPM's (Hu et al., 2024) with the keys of GPT-NeoX's pull request 1375; infinite_* are the infinite schedules of Ibrahim et al.
(2024, Simple and scalable strategies to continually pre-train large language models), with the keys of the StructMoE authors' GPT-NeoX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron.config.neox import NeoXConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Lengths in steps, not rounded. A length that the style does not use is 0."""

    peak: float
    minimum: float
    decay_steps: int
    warmup_steps: float
    style: str
    wsd_decay_steps: float = 0.0
    constant_rate: float = 0.0
    cooldown_steps: float = 0.0
    constant_steps: float = 0.0
    timescale: float = 0.0


def schedule_of(config: NeoXConfig) -> Schedule:
    """The schedule that a configuration asks for. It must have a learning rate and a number of steps (see check_trainable)."""
    optimizer, steps = config.optimizer, config.lr_decay_iters
    peak, style = optimizer.optimizer.params.lr, optimizer.lr_decay_style
    assert peak is not None
    assert steps is not None
    own: dict[str, float] = {}
    if style == "wsd":
        own = {"wsd_decay_steps": optimizer.wsd_decay_ratio * steps}
    elif style.startswith("infinite"):
        assert optimizer.constant_lr is not None
        own = {"cooldown_steps": optimizer.cooldown_iters_perc * steps, "constant_steps": optimizer.constant_iters_perc * steps}
        own |= {"constant_rate": optimizer.constant_lr} | ({"timescale": optimizer.timescale} if style == "infinite_inv_sqrt" else {})
    return Schedule(peak=peak, minimum=optimizer.min_lr, decay_steps=steps, warmup_steps=optimizer.warmup * steps, style=style, **own)


def learning_rate(schedule: Schedule, steps_done: int) -> float:
    """The rate of the step that follows `steps_done` completed ones.

    The warm-up may start below `minimum`. A warm-up of less than one step stays at the peak, which GPT-NeoX's exceeds.
    """
    warmup = schedule.warmup_steps
    if warmup > 0 and steps_done <= warmup:
        return min(schedule.peak, schedule.peak * max(1, steps_done) / warmup)
    return max(schedule.minimum, STYLES[schedule.style](schedule, steps_done - warmup, schedule.decay_steps - warmup))


def _constant(schedule: Schedule, done: float, total: float) -> float:
    return schedule.peak


def _linear(schedule: Schedule, done: float, total: float) -> float:
    return schedule.peak * (total - done) / total if total > 0 else schedule.peak


def _cosine(schedule: Schedule, done: float, total: float) -> float:
    return _half_wave(schedule.peak, schedule.minimum, done, total) if total > 0 else schedule.peak


def _exponential(schedule: Schedule, done: float, total: float) -> float:
    return schedule.peak * math.exp(-0.693 * done / total) if total > 0 else schedule.peak


def _wsd(schedule: Schedule, done: float, total: float) -> float:
    left = total - done
    if left >= schedule.wsd_decay_steps:
        return schedule.peak
    return _half_wave(schedule.peak, schedule.minimum, schedule.wsd_decay_steps - max(0.0, left), schedule.wsd_decay_steps)


def _infinite(schedule: Schedule, done: float, total: float) -> float:
    level, cooldown = schedule.constant_rate, schedule.cooldown_steps
    annealed, annealing = done - cooldown - schedule.constant_steps, total - cooldown - schedule.constant_steps
    if done < cooldown:
        return COOLDOWNS[schedule.style](schedule, done)
    if annealed <= 0 or annealing < 1:
        return level
    return level * (schedule.minimum / level) ** min(1.0, annealed / annealing)


def _cosine_cooldown(schedule: Schedule, done: float) -> float:
    return _half_wave(schedule.peak, schedule.constant_rate, done, schedule.cooldown_steps)


def _inverse_square_root_cooldown(schedule: Schedule, done: float) -> float:
    def fallen(share: float) -> float:
        return 1 / math.sqrt(1 + schedule.timescale * share) - 1

    return schedule.peak + (schedule.constant_rate - schedule.peak) * fallen(done / schedule.cooldown_steps) / fallen(1.0)


def _half_wave(high: float, low: float, done: float, total: float) -> float:
    """From `high` to `low` in `total` steps."""
    return low + (high - low) / 2 * (math.cos(math.pi * done / total) + 1)


STYLES: dict[str, Callable[[Schedule, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "wsd": _wsd,
    "infinite_cosine": _infinite,
    "infinite_inv_sqrt": _infinite,
}
"""Style -> rate after `done` of the `total` steps that follow the warm-up."""
COOLDOWNS: dict[str, Callable[[Schedule, float], float]] = {
    "infinite_cosine": _cosine_cooldown,
    "infinite_inv_sqrt": _inverse_square_root_cooldown,
}
