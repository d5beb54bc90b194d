"""How many curves a destination gets, and which."""

from __future__ import annotations

import logging
import math

import pytest

from megatron.monitor.curves import Curves, brief

PLAIN = {"train/lm_loss": 2.0, "moe/router_entropy": 1.0}
ROUTING = {"moe/router_entropy_by_layer": [0.5, 1.5], "moe/expert_load": [[1, 3], [2, 2]]}


def test_brief_is_the_extremes_over_layers_and_percentiles_over_experts() -> None:
    curves = Curves("A", detail="brief", most=100)
    load = {"min": 0.5, "p10": 0.65, "p50": 1.0, "p90": 1.35, "max": 1.5}
    expected = {**PLAIN, "moe/router_entropy/min": 0.5, "moe/router_entropy/max": 1.5} | {f"moe/expert_load/{k}": v for k, v in load.items()}
    assert curves({**PLAIN, **ROUTING}) == pytest.approx(expected)


def test_detailed_has_every_layer_and_expert() -> None:
    found = Curves("A", detail="detailed", most=100)({**PLAIN, **ROUTING})
    layers = {"moe/router_entropy/layer_0": 0.5, "moe/router_entropy/layer_1": 1.5}
    experts = {f"moe/expert_load/layer_{i}/{j}": float(ROUTING["moe/expert_load"][i][j]) for i in (0, 1) for j in (0, 1)}
    assert found == {**PLAIN, **layers, **experts}


def test_a_table_that_does_not_fit_becomes_brief_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    curves = Curves("TensorBoard", detail="detailed", most=20)
    values = {**PLAIN, "moe/expert_load": [[1] * 64] * 8}
    with caplog.at_level(logging.WARNING, logger="megatron"):
        for _ in range(3):
            assert set(curves(values)) == {*PLAIN, *(f"moe/expert_load/{name}" for name in ("min", "p10", "p50", "p90", "max"))}
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard has at most 20 curves (max_curves). Left out: moe/expert_load (507). metrics.jsonl has all numbers."
    ]


@pytest.mark.parametrize("detail", ["brief", "detailed"])
def test_there_are_never_more_curves_than_allowed_and_later_plain_numbers_have_room(detail: str) -> None:
    curves = Curves("A", detail=detail, most=50)  # type: ignore[arg-type]
    seen: set[str] = set()
    for step in range(4):
        norms = {f"gradient_norms/{n + 100 * step}": 1.0 for n in range(100)}
        seen |= curves({**norms, **ROUTING, **PLAIN, "moe/lore_load": [[1] * 40]}).keys()
    assert 38 <= len(seen) <= 40, "a fifth is spare"
    assert {*PLAIN} <= seen
    late = curves({f"validation/{n}": 1.0 for n in range(30)})
    assert list(late) == [f"validation/{n}" for n in range(50 - len(seen))]
    assert curves({f"validation/{n}": 1.0 for n in range(30)}) == late


def test_many_parameters_are_named_as_one_group(caplog: pytest.LogCaptureFixture) -> None:
    curves = Curves("Comet", detail="brief", most=5)
    with caplog.at_level(logging.WARNING, logger="megatron"):
        curves({f"gradient_norms/{n}": 1.0 for n in range(10)})
        curves({f"parameter_norms/{n}": 1.0 for n in range(10)})
        curves({f"parameter_norms/{n}": 1.0 for n in range(10)})
    assert [record.getMessage().split(". ")[1] for record in caplog.records] == ["Left out: gradient_norms (6)", "Left out: parameter_norms (10)"]


def test_brief_of_nothing_and_of_nan() -> None:
    assert brief("a", []) == {}
    assert brief("a", [[]]) == {}
    assert brief("a", [[0, 0]]) == {f"a/{name}": 0.0 for name in ("min", "p10", "p50", "p90", "max")}
    assert math.isnan(brief("a", math.nan)["a"])
