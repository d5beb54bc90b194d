"""Learning rates: GPT-NeoX's to the digit, the others by their equations."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron.testing.tiny import tiny_config
from megatron.training.schedule import STYLES, Schedule, learning_rate, schedule_of

NEOX: dict[str, Any] = {"peak": 1e-3, "minimum": 1e-4, "decay_steps": 100, "warmup_steps": 10.0}


def rate(style: str, steps_done: int, **numbers: float) -> float:
    return learning_rate(Schedule(**{**NEOX, "style": style, **numbers}), steps_done)


GOLDEN_COSINE = {0: "1.000000e-04", 1: "1.000000e-04", 10: "1.000000e-03", 11: "9.997259e-04", 55: "5.500000e-04", 100: "1.000000e-04"}


@pytest.mark.parametrize("steps_done", GOLDEN_COSINE)
def test_golden_cosine(steps_done: int) -> None:
    assert f"{rate('cosine', steps_done):.6e}" == GOLDEN_COSINE[steps_done]


def test_the_cosine_rises_again_after_its_end() -> None:
    assert f"{rate('cosine', 120):.4e}" == "2.0528e-04"


@pytest.mark.parametrize(
    ("style", "steps_done", "expected"),
    [
        ("linear", 11, "9.888889e-04"),
        ("linear", 55, "5.000000e-04"),
        ("linear", 99, "1.000000e-04"),
        ("linear", 130, "1.000000e-04"),
        ("exponential", 11, "9.923296e-04"),
        ("exponential", 55, "7.071588e-04"),
        ("exponential", 100, "5.000736e-04"),
        ("exponential", 1000, "1.000000e-04"),
        ("constant", 11, "1.000000e-03"),
        ("constant", 500, "1.000000e-03"),
    ],
)
def test_the_other_styles_of_gpt_neox(style: str, steps_done: int, expected: str) -> None:
    assert f"{rate(style, steps_done):.6e}" == expected


@pytest.mark.parametrize("style", STYLES)
def test_every_style_warms_up_alike(style: str) -> None:
    schedule = Schedule(**{**NEOX, "decay_steps": 25, "warmup_steps": 2.5, "style": style, "constant_rate": 5e-4, "timescale": 1.0})
    assert [learning_rate(schedule, n) for n in range(3)] == pytest.approx([4e-4, 4e-4, 8e-4]), "a share that is not rounded; step 0 is like step 1"


def test_a_warmup_of_less_than_a_step_does_not_exceed_the_peak() -> None:
    assert rate("linear", 0, peak=1.0, minimum=0.0, decay_steps=8, warmup_steps=0.08) == 1.0


def test_warmup_may_start_below_the_minimum() -> None:
    assert rate("linear", 1, peak=1.0, minimum=0.5) == pytest.approx(0.1)


@pytest.mark.parametrize("style", STYLES)
def test_no_warmup(style: str) -> None:
    assert rate(style, 0, warmup_steps=0.0, constant_rate=1e-3, cooldown_steps=10.0, timescale=1.0) == pytest.approx(1e-3)


def test_wsd_is_constant_and_then_half_a_wave() -> None:
    rates = [rate("wsd", n, wsd_decay_steps=20.0) for n in (10, 50, 80, 85, 90, 100, 130)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4 + 4.5e-4 * (1 + math.sqrt(0.5)), 5.5e-4, 1e-4, 1e-4])


def test_wsd_without_a_decay_ends_at_its_peak() -> None:
    assert rate("wsd", 100, wsd_decay_steps=0.0) == pytest.approx(1e-3)


INFINITE = {"constant_rate": 4e-4, "cooldown_steps": 30.0, "constant_steps": 40.0, "timescale": 8.0}


@pytest.mark.parametrize(
    ("style", "half_way"),
    [("infinite_cosine", 7e-4), ("infinite_inv_sqrt", 1e-3 - 6e-4 * (1 - 1 / math.sqrt(5)) / (1 - 1 / 3))],
)
def test_infinite_styles_cool_down_stay_and_anneal(style: str, half_way: float) -> None:
    rates = [rate(style, n, **INFINITE) for n in (10, 25, 40, 60, 80, 90, 100, 120)]
    assert rates == pytest.approx([1e-3, half_way, 4e-4, 4e-4, 4e-4, 2e-4, 1e-4, 1e-4]), "half of the way down in logarithms: sqrt(4e-4 * 1e-4)"


def test_infinite_without_annealing_stays_where_it_is() -> None:
    rates = [rate("infinite_cosine", n, constant_rate=4e-4, cooldown_steps=30.0, constant_steps=60.0) for n in (40, 100, 1000)]
    assert rates == pytest.approx([4e-4] * 3)


def test_the_configuration_s_shares_become_steps() -> None:
    keys = {"constant_lr": 5e-3, "cooldown_iters_perc": 0.7, "constant_iters_perc": 0.1, "timescale": 2.0, "warmup": 0.05, "lr_decay_iters": 200}
    schedule = schedule_of(tiny_config(lr_decay_style="infinite_inv_sqrt", **keys))
    numbers = {"constant_rate": 5e-3, "cooldown_steps": 140.0, "constant_steps": 20.0, "timescale": 2.0, "warmup_steps": 10.0, "decay_steps": 200}
    assert schedule == Schedule(peak=1e-2, minimum=1e-3, style="infinite_inv_sqrt", **numbers)  # type: ignore[arg-type]
    assert schedule_of(tiny_config(lr_decay_style="wsd", lr_decay_iters=200, warmup=0.0)) == Schedule(
        peak=1e-2, minimum=1e-3, style="wsd", decay_steps=200, warmup_steps=0.0, wsd_decay_steps=20.0
    )
