"""The committed protocol is whole, and every mistake in one is a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

from megatron.analysis.reproduce.protocol import PROTOCOL, ProtocolError, load_protocol, whole_text
from tests.analysis.reproduce.conftest import ROOT

Store = Callable[[dict[str, Any]], Path]


def test_the_committed_protocol_holds_and_every_arm_is_used() -> None:
    protocol = load_protocol(ROOT / PROTOCOL)
    compared = {arm for claim in protocol.claims.values() for arm in claim.arms}
    assert set(protocol.arms) == compared, "an arm that no claim uses is trained for nothing"
    assert all(len(tier.seeds) >= 3 for tier in protocol.tiers.values())
    assert all(match is None or match.within <= 0.04 for match in (arm.as_large_as for arm in protocol.arms.values()))
    assert protocol.sizes["structmoe"].total == 992_896
    assert protocol.sizes["dense-flop"].active < protocol.sizes["moe"].active < protocol.sizes["dense-param"].active


def test_the_protocol_of_the_open_choices_holds_and_its_runs_are_those_of_the_page() -> None:
    """docs/papers.md has the means of the runs in choices.json."""
    protocol = load_protocol(ROOT / "docs/reproduction/choices.yml")
    runs = json.loads((ROOT / "docs/reproduction/choices.json").read_text())["runs"]
    losses = {arm: [run["test_loss"] for run in runs if run["arm"] == arm] for arm in protocol.arms}
    assert {len(found) for found in losses.values()} == {3}
    page = (ROOT / "docs/papers.md").read_text()
    assert f"0 ({mean(losses['structmoe']):.3f})" in page
    for arm in set(losses) - {"structmoe"}:
        assert f"{mean(losses[arm]) - mean(losses['structmoe']):+.3f}" in page, arm


def test_what_a_protocol_does_not_say_comes_from_another(toy: dict[str, Any], stored: Store) -> None:
    whole = stored(toy)
    other = whole.with_name("other.yml")
    other.write_text(yaml.safe_dump({"rest_from": whole.name, "measure": {**toy["measure"], "test_tokens": 7}}))
    found = load_protocol(other)
    assert found.measure.test_tokens == 7
    assert found.arms == load_protocol(whole).arms
    alone = whole.parent / "elsewhere/protocol.yml"
    alone.parent.mkdir()
    alone.write_text(whole_text(other))
    assert load_protocol(alone) == found, "a copy needs no other file"
    assert whole_text(whole) == whole.read_text()


def test_an_arm_that_is_not_as_large_as_it_should_be_is_refused(toy: dict[str, Any], stored: Store) -> None:
    toy["arms"]["moe-9"]["as_large_as"] = {"arm": "structmoe", "count": "total", "within": 0.001}
    with pytest.raises(ProtocolError, match=r"arms.moe-9: has [\d,]+ total parameters, and structmoe has [\d,]+: [+-][\d.]+%, more than 0.1% apart"):
        load_protocol(stored(toy))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p["claims"]["wd-improves"]["sum"].update({"moe-wb": 1}), r"claims.wd-improves: there is no arm 'moe-wb'; there is structmoe, "),
        (lambda p: p["claims"]["wd-improves"].update(quantity="loss"), "claims.wd-improves.quantity: 'loss' is not measured; use one of test_loss"),
        (lambda p: p["claims"]["wd-improves"].update(quantity="speedup"), "the quantity speedup goes with the keys faster and slower"),
        (lambda p: p["arms"]["moe"].update(base="cosmos"), "arms.moe.base: there is no base 'cosmos'; there is structmoe, cosmoes"),
        (
            lambda p: p["tiers"]["full"].update(tuning={"more": {"steps": 2, "rates": [0.1]}}),
            "full.tuning: must name the groups core, or none; it names more",
        ),
        (lambda p: p["arms"]["moe"]["settings"].update(moe_top_k=9), "arms.moe: 'moe_top_k' = 9: must be at most moe_num_experts"),
        (lambda p: p["tiers"]["full"].update(steps="many"), "tiers.full.steps: input should be a valid integer"),
        (lambda p: p["tiers"]["full"].update(groups={"core": ["web"]}), "tiers.full.groups: there is no text 'web'; there is toy"),
        (lambda p: p["tuning"].update(domain="web"), "tuning.domain: there is no text 'web'; there is toy"),
        (lambda p: p.update(arm={}), "arm: extra inputs are not permitted"),
    ],
)
def test_a_mistake_is_named_with_its_place(toy: dict[str, Any], stored: Store, change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    change(toy)
    with pytest.raises(ProtocolError, match=sentence):
        load_protocol(stored(toy))


@pytest.mark.parametrize(("text", "sentence"), [("", "the file: input should be"), ("[", "is not YAML"), ("3", "the file: input should be")])
def test_a_file_that_is_no_protocol(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "p.yml").write_text(text)
    with pytest.raises(ProtocolError, match=sentence):
        load_protocol(tmp_path / "p.yml")
