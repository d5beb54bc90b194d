"""NeoX's learning rates (neox.md section 2.6) to the digit."""

from __future__ import annotations

import pytest

from megatron.training.schedule import Schedule, learning_rate

COSINE = Schedule(peak=1e-3, minimum=1e-4, decay_steps=100, warmup_steps=10.0, style="cosine")


@pytest.mark.parametrize(
    ("steps_done", "rate"), [(0, 1.0e-4), (1, 1.0e-4), (10, 1.0e-3), (11, 9.997259e-4), (55, 5.5e-4), (100, 1.0e-4), (120, 2.0528e-4)]
)
def test_golden_cosine(steps_done: int, rate: float) -> None:
    assert learning_rate(COSINE, steps_done) == pytest.approx(rate, rel=1e-4, abs=0)


@pytest.mark.parametrize(
    ("style", "steps_done", "rate"),
    [("linear", 55, 5e-4), ("linear", 100, 1e-4), ("linear", 130, 1e-4), ("constant", 10, 1e-3), ("constant", 500, 1e-3)],
)
def test_other_styles(style: str, steps_done: int, rate: float) -> None:
    schedule = Schedule(peak=1e-3, minimum=1e-4, decay_steps=100, warmup_steps=10.0, style=style)
    assert learning_rate(schedule, steps_done) == pytest.approx(rate)


def test_warmup_is_a_share_that_is_not_rounded() -> None:
    schedule = Schedule(peak=1.0, minimum=0.0, decay_steps=25, warmup_steps=2.5, style="constant")
    assert [learning_rate(schedule, n) for n in range(4)] == pytest.approx([0.4, 0.4, 0.8, 1.0])


def test_a_warmup_of_less_than_a_step_does_not_exceed_the_peak() -> None:
    assert learning_rate(Schedule(peak=1.0, minimum=0.0, decay_steps=8, warmup_steps=0.08, style="linear"), 0) == pytest.approx(1.0)


def test_warmup_may_start_below_the_minimum() -> None:
    schedule = Schedule(peak=1.0, minimum=0.5, decay_steps=100, warmup_steps=10.0, style="linear")
    assert learning_rate(schedule, 1) == pytest.approx(0.1)


def test_no_warmup() -> None:
    assert learning_rate(Schedule(peak=1.0, minimum=0.0, decay_steps=10, warmup_steps=0.0, style="linear"), 0) == pytest.approx(1.0)
