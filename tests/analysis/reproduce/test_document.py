"""The committed page is what the committed numbers give."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron.analysis.reproduce.document import DOCUMENT, FOLDER, LONG, REMARKS, RESULTS, as_json, document, stored, write_document
from megatron.analysis.reproduce.protocol import PROTOCOL, load_protocol
from tests.analysis.reproduce.conftest import ROOT
from tests.analysis.reproduce.test_claims import results, run

DOCS = ROOT / "docs"
COMMITTED = load_protocol(ROOT / PROTOCOL)


def test_the_page_is_made_from_the_numbers() -> None:
    found = stored(DOCS / FOLDER / RESULTS)
    assert found is not None
    remarks = (DOCS / FOLDER / REMARKS).read_text(encoding="utf-8")
    page = document(found, COMMITTED, remarks, stored(DOCS / FOLDER / LONG))
    assert page == (DOCS / DOCUMENT).read_text(encoding="utf-8"), "run `python tools/reproduce.py --report`"
    pictures = re.findall(r"\((reproduction/[\w-]+\.png)\)", page)
    assert len(pictures) >= 8
    assert [name for name in pictures if not (DOCS / name).is_file()] == []


def test_the_committed_numbers_are_of_the_committed_protocol() -> None:
    found = stored(DOCS / FOLDER / RESULTS)
    assert found is not None
    assert as_json(found) == (DOCS / FOLDER / RESULTS).read_text(encoding="utf-8")
    tier = COMMITTED.tiers[found["tier"]]
    assert set(found["tuning"]) == set(COMMITTED.arms)
    assert {run["steps"] for run in found["runs"]} == {tier.steps}
    for one in found["runs"]:
        assert one["rate"] == found["tuning"][one["arm"]]["rate"]


def test_a_page_of_a_few_runs_names_those_that_are_missing(tmp_path: Path) -> None:
    runs = [{**run("moe", seed=seed), "steps": 400, "tokens": 1000, "rate": 0.01, "seconds": 60, "seconds_measuring": 0, "cpu_seconds": 30}
            for seed in (1, 2)]  # fmt: skip
    for one in runs:
        one["routing"] = {"first_repeats": [1.0], "first_repeats_random": [12.5], "replacement": [50.0], "delta_uniform": [1.0]}
    some = {**results(runs, "quick"), "missing": [["moe", "sotu", 3]], "versions": None, "tuning_seconds": 0, "tuning_cpu_seconds": 0}
    some["tuning"] = {"moe": {"tried": [], "rate": 0.01}}
    path = write_document(some, COMMITTED, ROOT / PROTOCOL, tmp_path)
    page = path.read_text()
    assert "- moe on sotu: seed 3" in page
    assert "| `moe` | 3.000 ± 0.000 (3.000, 3.000) |" in page
    assert "2 runs took 1 minutes of one core" in page
    assert "**too few runs**" in page
    assert (tmp_path / FOLDER / "protocol.yml").read_text() == (ROOT / PROTOCOL).read_text()
    assert json.loads((tmp_path / FOLDER / RESULTS).read_text())["runs"] == runs


@pytest.mark.parametrize("name", ["full", "long", "quick"])
def test_every_claim_of_a_tier_has_its_arms(name: str) -> None:
    groups = COMMITTED.tiers[name].groups
    assert {"core"} <= set(groups) <= {arm.group for arm in COMMITTED.arms.values()}
