"""Which loads and entropies raise an alert, and which do not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megatron.monitor.alerts.alert import Alert
from megatron.monitor.alerts.routers import Limits, Routers, RouterStep, RouterWatch, named

DEFAULTS: dict[str, float] = {"dead_share": 0.01, "dead_lores": 0.5, "entropy": 0.05, "entropy_drop": 0.25, "overload": 2.0}


def watch(*, experts: int = 8, top_k: int | None = 2, lores: int = 0, processes: int = 1, log_interval: int = 1, settled: int = 0) -> RouterWatch:
    """Of a model with one layer."""
    routers = Routers(experts=(experts,), top_k=(top_k,), lores=lores, processes=processes)
    return RouterWatch(routers, Limits(**DEFAULTS), log_interval=log_interval, settled=settled)


def step(loads: Any, *, lores: Any = None, entropy: float = 2.0, overload: float = math.nan) -> RouterStep:
    loads = np.atleast_2d(np.array(loads, dtype=np.int64))
    lore_loads = np.zeros((len(loads), 0), dtype=np.int64) if lores is None else np.atleast_2d(np.array(lores, dtype=np.int64))
    return RouterStep(loads, lore_loads, np.full(len(loads), entropy), np.full(len(loads), overload))


def judged(rule: RouterWatch, steps: list[RouterStep]) -> list[Alert]:
    return [alert for number, now in enumerate(steps, 1) for alert in rule.judge(number, now)]


EVEN = step([100] * 8)
DEAD = step([100, 100, 100, 0, 100, 100, 100, 100])


def test_an_even_load_raises_nothing() -> None:
    assert judged(watch(), [EVEN] * 50) == []


def test_a_dead_expert_is_reported_once_and_again_only_after_it_was_alive() -> None:
    found = judged(watch(), [EVEN] * 3 + [DEAD] * 5 + [EVEN] * 3 + [DEAD] * 2)
    assert [(alert.kind, alert.step, alert.layer, alert.value, alert.limit) for alert in found] == [
        ("dead_experts", 4, 0, 0.0, 0.01),
        ("dead_experts", 12, 0, 0.0, 0.01),
    ]
    assert found[0].seen == "In the last 1 steps expert 3 got less than 1.0% of an even load (0.00%). In all 1 of 8 experts are dead."


def test_an_expert_near_the_limit_is_reported_once() -> None:
    nearly = [step([10000] * 7 + [few]) for few in (60, 120, 60, 120, 60)]
    assert [alert.step for alert in judged(watch(), nearly)] == [1]


def test_a_second_dead_expert_is_reported_too() -> None:
    two = step([100, 0, 100, 0, 100, 100, 100, 100])
    found = judged(watch(), [DEAD] * 2 + [two] * 2)
    assert [alert.step for alert in found] == [1, 3]
    assert "expert 1 got" in found[1].seen
    assert "2 of 8 experts are dead" in found[1].seen


def test_few_tokens_say_nothing_and_are_summed_until_they_do() -> None:
    """With 4 rows for each expert, 8 steps give the 32 rows that a judgement needs."""
    few = step([5, 5, 5, 0, 5, 4, 4, 4])
    assert [alert.step for alert in judged(watch(), [few] * 20)] == [8]
    random = np.random.default_rng(0)
    noise = [step(np.bincount(random.integers(0, 8, size=32), minlength=8)) for _ in range(3000)]
    assert judged(watch(), noise) == []


@pytest.mark.parametrize("log_interval", [1, 10, 50])
@pytest.mark.parametrize("dies_after", [100, 107, 137, 149])
def test_a_dead_expert_is_reported_within_one_log_interval(log_interval: int, dies_after: int) -> None:
    found = judged(watch(log_interval=log_interval), [EVEN] * dies_after + [DEAD] * 100)
    assert [alert.step for alert in found] == [dies_after + min(log_interval, 10)]


def test_loads_are_judged_after_the_warm_up_and_entropies_before_it() -> None:
    assert [(alert.kind, alert.step) for alert in judged(watch(settled=30), [DEAD] * 40)] == [("dead_experts", 31)]
    collapsed = step([100, 100, 100, 0, 100, 100, 100, 100], entropy=0.01, overload=3.0)
    assert [(alert.kind, alert.step) for alert in judged(watch(settled=30), [collapsed] * 25)] == [("router_collapse", 1)]


def test_a_router_that_is_sure_of_everything_has_collapsed() -> None:
    found = judged(watch(), [step([100] * 8, entropy=2.0)] * 20 + [step([100] * 8, entropy=0.4)] * 3)
    assert [(alert.kind, alert.step) for alert in found] == [("router_collapse", 21)]
    assert found[0].limit == pytest.approx(0.5)
    assert found[0].seen == "The entropy of its probabilities is 0.4000 nats; the median of the 20 steps before is 2.000, and the limit is 0.5000."
    found = judged(watch(), [step([100] * 8, entropy=0.1)] * 3)
    assert [alert.step for alert in found] == [1], "below 5 % of log 8 without any history"
    assert found[0].limit == pytest.approx(0.05 * math.log(8))


def test_an_entropy_that_falls_slowly_has_not_collapsed() -> None:
    assert judged(watch(), [step([100] * 8, entropy=2 * 0.997**n) for n in range(900)]) == [], "it ends at 0.13"


def test_the_same_experts_for_every_token_are_a_collapse_and_not_six_dead_experts() -> None:
    found = judged(watch(), [EVEN] * 5 + [step([390, 390, 5, 5, 0, 0, 0, 0])] * 5)
    assert [(alert.kind, alert.step) for alert in found] == [("router_collapse", 6)]
    assert found[0].seen == "98.7% of the rows go to experts 0, 1 of 8; the limit is 95%."


def test_where_the_router_chooses_the_number_its_load_is_not_compared_with_k() -> None:
    found = judged(watch(top_k=None), [step([400, 400, 0, 0, 0, 0, 0, 0])])
    assert [alert.kind for alert in found] == ["dead_experts"]


def test_most_lores_of_a_layer_must_be_dead() -> None:
    some = step([100] * 4, lores=[50, 50, 0, 0] + [25] * 12)
    most = step([100] * 4, lores=[100, 0, 0, 0] * 4)
    found = judged(watch(experts=4, lores=4), [some] * 150 + [most] * 150)
    assert [(alert.kind, alert.value, alert.limit) for alert in found] == [("dead_lores", 0.75, 0.5)]
    assert found[0].step == 250
    assert "In 100 steps 12 of 16 LoREs got less than 1.0% of an even load of their expert; the limit is 50% of them." in found[0].seen


def test_lores_that_are_without_tokens_for_some_tens_of_steps_raise_nothing() -> None:
    some = step([100] * 4, lores=[25] * 16)
    most = step([100] * 4, lores=[100, 0, 0, 0] * 4)
    assert judged(watch(experts=4, lores=4), ([some] * 50 + [most] * 50) * 5) == []


def test_the_lores_of_a_dead_expert_are_not_counted() -> None:
    dead = step([100, 100, 100, 0, 100, 100, 100, 100], lores=([50, 50] * 3 + [0, 0]) + [50, 50] * 4)
    assert [alert.kind for alert in judged(watch(lores=2), [dead] * 120)] == ["dead_experts"]


@pytest.mark.parametrize(("processes", "overload", "limit"), [(2, 1.55, None), (2, 1.65, 1.6), (8, 1.9, None), (8, 2.1, 2.0), (1, 1.0, None)])
def test_an_overloaded_process(processes: int, overload: float, limit: float | None) -> None:
    found = judged(watch(processes=processes), [step([100] * 7 + [150], overload=overload)] * 3)
    assert [alert.limit for alert in found] == ([] if limit is None else [pytest.approx(limit)])
    if found:
        assert f"The busiest of {processes} expert-parallel processes gets {overload:.2f} times the mean number of rows" in found[0].seen
        assert found[0].seen.endswith(f"It is number {processes - 1} (from 0).")


def test_without_expert_parallelism_the_overload_is_nan_and_says_nothing() -> None:
    assert judged(watch(), [step([100] * 8, overload=math.nan)] * 3) == []


def test_each_layer_has_its_own_alerts_and_layers_of_other_sizes_are_cut() -> None:
    routers = Routers(experts=(8, 4), top_k=(2, 2), lores=0, processes=1)
    rule = RouterWatch(routers, Limits(**DEFAULTS), log_interval=1, settled=0)
    loads = [[100] * 8, [200, 200, 200, 0, 0, 0, 0, 0]]
    found = judged(rule, [step(loads)] * 2)
    assert [(alert.kind, alert.layer) for alert in found] == [("dead_experts", 1)]
    assert "1 of 4 experts are dead" in found[0].seen


def test_many_numbers_are_not_all_listed() -> None:
    assert named("expert", list(range(10))) == "experts 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_an_alert_as_a_sentence_and_as_a_record() -> None:
    alert = Alert(kind="dead_experts", step=7, layer=2, value=math.nan, limit=0.01, seen="Expert 3 got nothing.")
    assert alert.sentence.startswith(
        "ALERT at step 7: dead experts in MoE layer 2. Expert 3 got nothing. What to try: Raise the coefficient of load_b"
    )
    assert alert.record() == {"kind": "dead_experts", "step": 7, "layer": 2, "value": None, "limit": 0.01, "seen": alert.seen, "try": alert.advice}


def test_zero_copy_and_constant_experts_have_no_lores() -> None:
    """Their loads are judged, and the LoREs of the others."""
    limits = watch().limits
    routers = Routers(experts=(6,), top_k=(2,), lores=4, processes=1, zero_computation=2)
    rule = RouterWatch(routers, limits, log_interval=1, settled=0)
    even = RouterStep(np.full((1, 6), 100), np.full((1, 16), 25), np.full(1, 1.5), np.full(1, math.nan))
    assert judged(rule, [even] * 110) == []
    dead = even._replace(lore_load_XG=np.array([[100, 0, 0, 0] * 4]))
    assert {alert.kind for alert in judged(rule, [dead] * 110)} == {"dead_lores"}
