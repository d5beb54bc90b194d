"""Passkey retrieval: the texts, the judgement, and a whole run with pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron.config import config_from_dict
from megatron.data.progress import LineReporter
from megatron.inference.errors import InferenceError
from megatron.inference.evaluation import evaluate
from megatron.inference.long_context.passkey import FILLER, Asked, fitting, judged, remarks, trials_of, written
from megatron.inference.model import ReadyModel
from tests.inference.conftest import build_ready, engine_of, lively_config

LONG = {"seq_length": 600, "max_position_embeddings": 600}


@pytest.fixture(scope="module")
def long_ready() -> ReadyModel:
    return build_ready(lively_config(**LONG))


def test_texts_have_their_length_and_the_number_where_it_should_be(long_ready: ReadyModel) -> None:
    asked = Asked((600,), 3, 2, 7)
    trials = list(trials_of(engine_of(long_ready), asked, 600))
    assert [trial.depth for trial in trials] == [0, 0, 0.5, 0.5, 1, 1]
    for trial in trials:
        assert trial.text.count(trial.key) == 2
        room = 600 - len(f" {trial.key}") - 4
        assert room - len(FILLER) < len(trial.tokens) <= room, "as long as whole pieces of filler allow"
    first, last = trials[0].text.index(trials[0].key), trials[-1].text.index(trials[-1].key)
    assert first < 200 < last
    assert [trial.key for trial in trials] == [trial.key for trial in trials_of(engine_of(long_ready), asked, 600)], "drawn from the seed"


def test_lengths_that_cannot_be(long_ready: ReadyModel) -> None:
    with pytest.raises(InferenceError, match=r"eval_passkey_lengths: 700 tokens, and the model has positions for 600"):
        list(trials_of(engine_of(long_ready), Asked((700,), 1, 1, 0), 700))
    with pytest.raises(InferenceError, match=r"eval_passkey_lengths: 100 tokens; the sentences alone need \d+ with this tokenizer"):
        list(trials_of(engine_of(long_ready), Asked((100,), 1, 1, 0), 100))


def test_an_answer_is_right_if_it_begins_with_the_number(long_ready: ReadyModel) -> None:
    asked = Asked((600,), 2, 2, 0)
    trials = list(trials_of(engine_of(long_ready), asked, 600))
    answers = [f" {trials[0].key}.", "12", f"{trials[2].key}", f"it is {trials[3].key}"]
    found = judged(asked, trials, answers)
    assert found.accuracy == {600: [0.5, 0.5]}
    assert [wrong["answer"] for wrong in found.examples] == ["12", f"it is {trials[3].key}"]
    assert remarks(found) == []
    assert "says nothing about how far its attention reaches" in remarks(judged(asked, trials, [""] * 4))[0]


def test_fitting_is_the_largest_count() -> None:
    assert [fitting(lambda count, most=most: count <= most) for most in (0, 1, 2, 7, 100)] == [0, 1, 2, 7, 100]
    assert written(4, 0.5, "1").split(" The pass key is 1.")[0].count(FILLER) == 2


def test_a_run_writes_tables_numbers_and_pictures(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("The state of the Union is strong. " * 9)
    console = Console(file=io.StringIO(), width=160)
    keys = {"eval_text_files": [str(text)], "eval_position_ranges": 3, "eval_results_prefix": str(tmp_path / "long")}
    path = evaluate(config_from_dict({**checkpoint, **keys}), console, LineReporter(Console(file=io.StringIO())))
    assert path is not None
    found = json.loads(path.read_text())
    assert [row["last"] for row in found["context"][str(text)]] == [8, 16, 32]
    assert "tokens of context" in console.file.getvalue()  # type: ignore[attr-defined]
    (picture,) = tmp_path.glob("*_context.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
