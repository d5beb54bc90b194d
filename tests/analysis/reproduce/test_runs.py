"""Real runs at toy size: done once, the same again, stopped and resumed, and a failure that stops nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megatron.analysis.reproduce.command import COMPARED, prepare_texts
from megatron.analysis.reproduce.measure import loss_on, windows
from megatron.analysis.reproduce.pool import Pool
from megatron.analysis.reproduce.protocol import Protocol
from megatron.analysis.reproduce.runs import CONFIG, MAIN, Order, Place, Run, make_run, record_of
from megatron.config.loader import load_config
from megatron.training.run import train


@dataclass
class Told:
    """Who was told what."""

    finished: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    def done(self, run: Run, seconds: float) -> None:
        self.finished.append(run.arm)

    def failed(self, run: Run, sentence: str) -> None:
        self.sentences.append(sentence)


@pytest.fixture
def place(protocol: Protocol, tmp_path: Path) -> Place:
    place = Place(tmp_path / "runs", tmp_path / "data")
    prepare_texts(protocol, place, ["toy"])
    return place


def numbers(run: Run, place: Place) -> dict[str, Any]:
    record = record_of(run, place)
    assert record is not None
    return {key: record.get(key) for key in COMPARED}


def test_runs_are_done_once_and_give_the_same_again(protocol: Protocol, place: Place, tmp_path: Path) -> None:
    run = make_run(protocol, place, Order(MAIN, "structmoe", "toy", 1, 0.006, 8))
    broken = replace(run, arm="broken", settings={**run.settings, "vocab_file": "none.json"})
    told = Told()
    pool = Pool(place, 2, told)
    pool.finish([run, broken])
    assert told.finished == ["structmoe"]
    assert len(pool.failures) == 1
    assert "none.json" in pool.failures[0]
    assert f"Its log: {place.folder(broken)}/log.txt" in pool.failures[0]

    first = numbers(run, place)
    assert [step for step, _ in first["curve"]] == [2, 4, 6, 8]
    assert {"replacement", "first_repeats", "lore_entropy"} <= set(first["routing"])
    trainer = train(load_config([place.folder(run) / CONFIG], [f"save={tmp_path / 'plain'}", "threads_per_process=1"]))
    text_NS = windows(run.measure["test"], length=16, tokens=128)
    assert loss_on(trainer.engine, text_NS) == pytest.approx(first["test_loss"], rel=1e-6), "train.py with the run's configuration gives this model"

    pool.finish([run])
    assert told.finished == ["structmoe"], "what has been run is not run again"
    elsewhere = Place(tmp_path / "elsewhere", place.data)
    Pool(elsewhere, 1, told).finish([run])
    assert numbers(run, elsewhere) == first


def when_there(path: Path, act: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        for _ in range(3000):
            if path.exists() and path.read_text().count("\n") >= 6:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow  # two runs of a few hundred steps, so that the signal arrives in the middle of one
def test_a_stopped_run_goes_on_and_gives_the_same_numbers(protocol: Protocol, place: Place, tmp_path: Path) -> None:
    run = make_run(protocol, place, Order(MAIN, "moe-9", "toy", 1, 0.006, 400))
    told = Told()
    elsewhere = Place(tmp_path / "elsewhere", place.data)
    Pool(elsewhere, 1, told).finish([run])

    watcher = when_there(place.folder(run) / "save" / "metrics.jsonl", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        Pool(place, 1, told).finish([run])
    watcher.join()
    assert record_of(run, place) is None
    assert (place.folder(run) / "save" / "latest").is_file(), "it saved a checkpoint"
    Pool(place, 1, told).finish([run])
    assert numbers(run, place) == numbers(run, elsewhere)


def test_windows_are_spread_over_the_whole_text(place: Place) -> None:
    prefix = place.text("toy") / "train_text_document"
    every, few = windows(prefix, length=16, tokens=10**9), windows(prefix, length=16, tokens=80)
    assert every[:-1, -1].tolist() == every[1:, 0].tolist(), "neighbours share one token"
    assert len(few) == 5
    assert few[0].tolist() == every[0].tolist()
    assert few[-1].tolist() == every[-1].tolist()
