"""Which losses raise an alert, and which do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.monitor.alerts.losses import LossSpikes, NonfiniteSteps


def spikes_in(losses: list[float]) -> list[int]:
    """The steps, counted from 0, at which the defaults raise an alert."""
    rule = LossSpikes(rise=0.2, deviations=6.0)
    return [step for step, loss in enumerate(losses) if rule.judge(step, loss)]


def noisy(steps: int, *, noise: float, seed: int = 0, start: float = 10.0) -> list[float]:
    """A loss that falls from `start` to 3 as in training."""
    random = np.random.default_rng(seed)
    return [3 + (start - 3) * math.exp(-step / 60) + noise * float(random.standard_normal()) for step in range(steps)]


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.1, 0.5])
def test_noise_and_a_loss_that_falls_fast_raise_nothing(noise: float) -> None:
    for seed in range(4):
        assert spikes_in(noisy(2000, noise=noise, seed=seed)) == []


def test_a_spike_raises_one_alert_at_its_first_step() -> None:
    losses = noisy(400, noise=0.03)
    for step, rise in {200: 2.0, 201: 1.5, 202: 1.0, 203: 0.6}.items():
        losses[step] += rise
    losses[300] += 1
    assert spikes_in(losses) == [200, 300]


def test_a_loss_that_comes_back_in_steps_is_one_spike() -> None:
    losses = [2.0 + 0.1 * (step % 2) for step in range(60)] + [8.0, 4.0, 2.6, 3.0, 2.5, 3.0, 2.05, 2.0, 8.0]
    assert spikes_in(losses) == [60, 68]


def test_a_spike_is_seen_while_the_loss_still_falls_fast() -> None:
    losses = noisy(60, noise=0.03)
    losses[30] += 3
    assert spikes_in(losses) == [30]


def test_a_lasting_rise_raises_one_alert() -> None:
    assert spikes_in([*noisy(300, noise=0.03), *(x + 3 for x in noisy(300, noise=0.03, start=3.1))]) == [300]


def test_the_limit_is_the_larger_of_nats_and_deviations() -> None:
    rule = LossSpikes(rise=0.2, deviations=6.0)
    for step in range(50):
        rule.judge(step, 2.0)
    (alert,) = rule.judge(50, 2.21)
    assert (alert.kind, alert.step, alert.layer) == ("loss_spike", 50, None)
    assert alert.limit == pytest.approx(2.2)
    assert alert.value == 2.21
    assert alert.seen == "The loss is 2.210. The median of the 20 steps before is 2.000, and the limit is 2.200."
    rule = LossSpikes(rise=0.2, deviations=6.0)
    for step in range(50):
        rule.judge(step, 2.0 + 0.1 * (step % 2))
    assert rule.judge(50, 2.6) == [], "6 * 1.4826 / sqrt(2) * 0.1 = 0.63 above 2.05"
    assert rule.judge(51, 2.75)


def test_nothing_is_judged_before_ten_losses_and_nan_is_left_out() -> None:
    assert spikes_in([2.0] * 9 + [9.0]) == []
    assert spikes_in([2.0] * 10 + [9.0]) == [10]
    assert spikes_in([2.0] * 10 + [math.nan, math.inf, 2.0, 9.0]) == [13]


def test_a_streak_is_reported_at_its_start_and_when_it_has_doubled() -> None:
    rule = NonfiniteSteps(limit=1)
    found = [alert for step in range(20) for alert in rule.judge(step, finite=step < 3 or step == 12, loss=math.nan, grad_norm=1.0)]
    assert [(alert.step, alert.value) for alert in found] == [(3, 1), (4, 2), (6, 4), (10, 8), (13, 1), (14, 2), (16, 4)]
    assert found[0].seen == "The loss is nan in this step."
    assert found[1].seen == "The loss is nan, and the last 2 steps in a row were not finite."


def test_the_length_of_a_streak_can_be_set() -> None:
    rule = NonfiniteSteps(limit=3)
    found = [alert for step in range(1, 8) for alert in rule.judge(step, finite=False, loss=2.0, grad_norm=math.inf)]
    assert [(alert.step, alert.value, alert.limit) for alert in found] == [(3, 3, 3), (6, 6, 3)]
    assert found[0].seen == "The gradient norm is inf, and the last 3 steps in a row were not finite."
