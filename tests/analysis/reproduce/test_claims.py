"""The number of each claim, from runs whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron.analysis.reproduce.claims import number_of, outcome, quantity, speedup
from megatron.analysis.reproduce.protocol import PROTOCOL, load_protocol
from tests.analysis.reproduce.conftest import ROOT

PROTOCOL_OF_REPOSITORY = load_protocol(ROOT / PROTOCOL)


def run(arm: str, domain: str = "sotu", seed: int = 1, loss: float = 3.0, **routing: Any) -> dict[str, Any]:
    curve = [[100, loss + 1], [200, loss + 0.5], [300, loss + 0.25], [400, loss]]
    return {"arm": arm, "domain": domain, "seed": seed, "test_loss": loss, "curve": curve, "routing": routing}


def results(runs: list[dict[str, Any]], tier: str = "full") -> dict[str, Any]:
    return {"tier": tier, "runs": runs, "missing": []}


def test_a_lower_loss_of_structmoe_on_every_seed_is_shown() -> None:
    runs = [run(arm, domain, seed, 3.0 + 0.001 * seed - lead) for domain in ("sotu", "stdlib") for seed in (1, 2, 3) for arm, lead in
            (("structmoe", 0.05 + 0.001 * seed), ("moe-9", 0.0))]  # fmt: skip
    found = outcome("structmoe-beats-moe", PROTOCOL_OF_REPOSITORY, results(runs))
    assert found.verdict == "shown"
    assert found.whole.mean == pytest.approx(0.052)
    assert (found.whole.count, found.wanted) == (6, 6)
    turned = [{**one, "arm": {"structmoe": "moe-9", "moe-9": "structmoe"}[one["arm"]]} for one in runs]
    assert outcome("structmoe-beats-moe", PROTOCOL_OF_REPOSITORY, results(turned)).verdict == "reversed"


def test_pairs_without_a_partner_do_not_count_and_texts_that_differ_are_named() -> None:
    runs = [run("structmoe", "sotu", seed, 2.0 - 0.001 * seed) for seed in (1, 2, 3)] + [run("moe-9", "sotu", seed, 2.5) for seed in (1, 2)]
    found = outcome("structmoe-beats-moe", PROTOCOL_OF_REPOSITORY, results(runs))
    assert set(found.values) == {("sotu", 1), ("sotu", 2)}
    assert not found.texts_differ
    runs += [run("structmoe", "stdlib", seed, 2.5 + 0.001 * seed) for seed in (1, 2)] + [run("moe-9", "stdlib", seed, 2.0) for seed in (1, 2)]
    found = outcome("structmoe-beats-moe", PROTOCOL_OF_REPOSITORY, results(runs))
    assert found.texts_differ
    assert found.verdict == "within noise"


def test_a_claim_whose_arms_a_tier_does_not_have_is_not_wanted() -> None:
    found = outcome("more-experts", PROTOCOL_OF_REPOSITORY, results([run("moe")], "quick"))
    assert (found.wanted, found.verdict) == (0, "too few runs")


def test_the_quantities() -> None:
    one = run(
        "moe",
        replacement=[20.0, 12.0],
        delta_uniform=[1.0, 3.0],
        lore_entropy=[0.5, 0.7],
        first_repeats=[13.5, 20.5, 22.5],
        first_repeats_random=[12.5] * 3,
    )
    assert quantity("second_half", one) == pytest.approx(-0.5)
    assert quantity("replacement", one) == 16.0
    assert quantity("log2_replacement", one) == 4.0
    assert quantity("delta_uniform", one) == 2.0
    assert quantity("lore_entropy", one) == pytest.approx(0.6)
    assert quantity("repeats", one) == 9.0
    assert quantity("repeats_first_layer", one) == 1.0
    assert quantity("repeats_by_depth", one) == 8.0


def test_speed_is_the_step_at_which_one_curve_reaches_the_other_s_end() -> None:
    slower = [[100, 5.0], [200, 4.0]]
    assert speedup([[100, 4.5], [200, 3.5]], slower) == pytest.approx(math.log2(200 / 150))
    assert speedup(slower, [[100, 4.5], [200, 3.5]]) == pytest.approx(-math.log2(200 / 150))
    assert speedup([[100, 4.0], [200, 3.5]], slower) == 1.0
    assert speedup(slower, slower) == 0.0
    claim = PROTOCOL_OF_REPOSITORY.claims["faster-than-dense"]
    assert number_of(claim, {"moe": {"curve": [[100, 4.0], [200, 3.0]]}, "dense-flop": {"curve": slower}}) == 1.0
