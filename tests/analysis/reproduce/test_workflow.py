"""Which rates are tried, which is the best, and which runs follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.analysis.reproduce.protocol import Protocol, Tuning
from megatron.analysis.reproduce.results import collect, known_rates
from megatron.analysis.reproduce.runs import RECORD, Place, Run, of_another_protocol, record_of, write_record
from megatron.analysis.reproduce.workflow import Workflow, best, beyond, ladder

TUNING = Tuning(domain="toy", seed=1, lowest=0.003, highest=0.048, final=0.1)
RATES = [0.006, 0.012, 0.024]


def test_rates_are_doubled_and_halved_within_the_limits() -> None:
    assert ladder(RATES, TUNING) == [0.003, 0.006, 0.012, 0.024, 0.048]


@pytest.mark.parametrize(
    ("tried", "following"),
    [
        ({0.006: 3.0, 0.012: 2.0, 0.024: 3.0}, []),
        ({0.006: 1.0, 0.012: 2.0, 0.024: 3.0}, [0.003]),
        ({0.003: 0.5, 0.006: 1.0, 0.012: 2.0, 0.024: 3.0}, []),
        ({0.006: 3.0, 0.012: 2.0, 0.024: 1.0}, [0.048]),
        ({0.006: 3.0, 0.012: 2.0, 0.024: 1.0, 0.048: 1.5}, []),
    ],
)
def test_a_best_rate_at_the_edge_asks_for_the_next_one(tried: dict[float, float], following: list[float]) -> None:
    assert beyond(tried, ladder(RATES, TUNING)) == following


def test_of_two_equal_rates_the_lower_is_taken() -> None:
    assert best({0.024: 1.0, 0.012: 1.0}) == 0.012


def finish(run: Run, place: Place, **numbers: Any) -> None:
    place.folder(run).mkdir(parents=True, exist_ok=True)
    facts = {"arm": run.arm, "domain": run.domain, "seed": run.seed, "rate": run.rate, "steps": run.steps, "tokens": 1, "versions": {}}
    write_record(place.folder(run) / RECORD, {"fingerprint": run.fingerprint, **facts, **numbers})


def test_a_tier_from_the_first_rate_to_the_last_run(protocol: Protocol, tmp_path: Path) -> None:
    place = Place(tmp_path / "runs", tmp_path / "data")
    workflow = Workflow(protocol, place, protocol.tiers["full"], {})
    assert workflow.main_runs("core") == []
    wanted = workflow.open_tuning("core")
    assert sorted((run.arm, run.rate) for run in wanted) == [("moe-9", 0.006), ("moe-9", 0.012), ("structmoe", 0.006), ("structmoe", 0.012)]
    for run in wanted:
        finish(run, place, validation_loss=run.rate)
    assert workflow.open_tuning("core") == []
    runs = workflow.main_runs("core")
    assert [(run.seed, run.arm) for run in runs] == [(1, "structmoe"), (1, "moe-9"), (2, "structmoe"), (2, "moe-9")], "seed by seed"
    assert {run.rate for run in runs} == {0.006}
    assert len({place.folder(run) for run in runs}) == 4
    finish(runs[0], place, test_loss=3.0)
    results = collect(workflow, "full")
    assert [run["test_loss"] for run in results["runs"]] == [3.0]
    assert results["missing"] == [["moe-9", "toy", 1], ["structmoe", "toy", 2], ["moe-9", "toy", 2]]
    assert results["tuning"]["moe-9"] == {"tried": [[0.006, 0.006], [0.012, 0.012]], "rate": 0.006}


def test_a_tier_that_does_not_tune_takes_the_rates_it_is_given(protocol: Protocol, tmp_path: Path) -> None:
    workflow = Workflow(protocol, Place(tmp_path / "runs", tmp_path / "data"), protocol.tiers["quick"], {"moe-9": 0.5})
    assert [(run.arm, run.seed, run.rate) for run in workflow.main_runs("core")] == [("moe-9", 1, 0.5), ("moe-9", 2, 0.5)]
    results = collect(workflow, "quick")
    assert results["tuning"] == {"structmoe": {"tried": [], "rate": None}, "moe-9": {"tried": [], "rate": 0.5}}
    assert len(results["missing"]) == 4


def test_a_run_of_another_protocol_is_not_taken_for_this_one(protocol: Protocol, toy: dict[str, Any], tmp_path: Path) -> None:
    place = Place(tmp_path / "runs", tmp_path / "data")
    run = Workflow(protocol, place, protocol.tiers["full"], {}).open_tuning("core")[0]
    finish(run, place, validation_loss=1.0)
    assert record_of(run, place) is not None
    toy["common"]["weight_decay"] = 0.2
    other = Workflow(Protocol.model_validate(toy), place, protocol.tiers["full"], {}).open_tuning("core")[0]
    assert other.name == run.name
    assert record_of(other, place) is None
    assert of_another_protocol([run, other], place) == [other]


def test_a_record_that_was_cut_short_is_none(protocol: Protocol, tmp_path: Path) -> None:
    place = Place(tmp_path / "runs", tmp_path / "data")
    run = Workflow(protocol, place, protocol.tiers["full"], {}).open_tuning("core")[0]
    finish(run, place, validation_loss=1.0)
    path = place.folder(run) / RECORD
    path.write_text(path.read_text()[:-9])
    assert record_of(run, place) is None


def test_the_rates_of_a_tier_that_does_not_tune(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"tuning": {"moe": {"tried": [], "rate": 0.006}, "other": {"tried": [], "rate": null}}}')
    assert known_rates(tmp_path / "results.json") == {"moe": 0.006}
    with pytest.raises(ValueError, match=r"There is no .*none.json, which has the learning rate of each arm. Restore it from git"):
        known_rates(tmp_path / "none.json")
    (tmp_path / "results.json").write_text('{"tuning": 3}')
    with pytest.raises(ValueError, match="cannot be read as the results of a full run"):
        known_rates(tmp_path / "results.json")
