"""The committed page is what the committed numbers give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("name", [RESULTS, LONG])
def test_the_committed_numbers_are_of_the_committed_protocol(name: str) -> None:
    found = stored(DOCS / FOLDER / name)
    assert found is not None
    assert as_json(found) == (DOCS / FOLDER / name).read_text(encoding="utf-8")
    tier = COMMITTED.tiers[found["tier"]]
    assert found["missing"] == []
    assert set(found["tuning"]) == {arm for arm, one in COMMITTED.arms.items() if one.group in tier.groups}
    assert {run["steps"] for run in found["runs"]} == {tier.steps}
    for one in found["runs"]:
        assert one["rate"] == found["tuning"][one["arm"]]["rate"]


def some_results(tier: str) -> dict[str, Any]:
    """Two runs of one arm; the third is missing."""
    facts = {"steps": 400, "tokens": 1000, "rate": 0.01, "seconds": 60, "seconds_measuring": 0, "cpu_seconds": 30}
    runs = [{**run("moe", seed=seed), **facts} for seed in (1, 2)]
    for one in runs:
        one["routing"] = {"first_repeats": [1.0], "first_repeats_random": [12.5], "replacement": [50.0], "delta_uniform": [1.0]}
    rest = {"missing": [["moe", "sotu", 3]], "versions": None, "tuning_seconds": 0, "tuning_cpu_seconds": 0}
    return {**results(runs, tier), **rest, "tuning": {"moe": {"tried": [], "rate": 0.01}}}


def test_a_page_of_a_few_runs_names_those_that_are_missing(tmp_path: Path) -> None:
    some = some_results("quick")
    page = write_document(some, COMMITTED, ROOT / PROTOCOL, tmp_path).read_text()
    assert "- moe on sotu: seed 3" in page
    assert "| `moe` | 3.000 ± 0.000 (3.000, 3.000) |" in page
    assert "2 runs took 1 minutes of one core" in page
    assert "**too few runs**" in page
    assert "times as long" not in page
    assert (tmp_path / FOLDER / "protocol.yml").read_text() == (ROOT / PROTOCOL).read_text()
    assert json.loads((tmp_path / FOLDER / RESULTS).read_text())["runs"] == some["runs"]


def test_the_long_tier_has_a_section_of_its_own(tmp_path: Path) -> None:
    page = document(some_results("full"), COMMITTED, "", some_results("long"))
    section = page.split("## 3 times as long")[1].split("\n## ")[0]
    assert "1,500 steps in place of 500" in " ".join(section.split())
    assert "| `moe` | 3.000 ± 0.000 (3.000, 3.000) |" in section
    assert "- moe on sotu: seed 3" in section
    assert write_document(some_results("long"), COMMITTED, ROOT / PROTOCOL, tmp_path).read_text().count("times as long") == 1
    assert not (tmp_path / FOLDER / RESULTS).exists()


@pytest.mark.parametrize("name", ["full", "long", "quick"])
def test_every_claim_of_a_tier_has_its_arms(name: str) -> None:
    groups = COMMITTED.tiers[name].groups
    assert {"structmoe", "cosmoes"} <= set(groups) <= {arm.group for arm in COMMITTED.arms.values()}
