"""eval.py's work without the process around it."""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron.config import config_from_dict
from megatron.config.evaluation import EvaluationConfig
from megatron.config.section import ConfigError
from megatron.data.progress import LineReporter
from megatron.inference.errors import InferenceError
from megatron.inference.evaluation import evaluate, read_texts, results_path, write_results
from megatron.inference.model import ReadyModel
from megatron.inference.score import score_text

TEXT = "The state of the Union is — as ever — strong. " * 3


@pytest.fixture
def keys(checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two text files, named in a configuration; results go to `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"line\r\nline\n")
    return {**checkpoint, "eval_text_files": ["a.txt", "b.txt"]}


def run(keys: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], str, str]:
    """Results file, standard output, progress."""
    console, progress = Console(file=io.StringIO(), width=200), Console(file=io.StringIO(), width=200)
    path = evaluate(config_from_dict({**keys, **changes}), console, LineReporter(progress))
    return json.loads(path.read_text()), console.file.getvalue(), progress.file.getvalue()  # type: ignore[attr-defined]


def test_each_file_is_scored_as_a_text(keys: dict[str, Any], ready: ReadyModel) -> None:
    found, screen, progress = run(keys)
    assert list(found["results"]) == ["a.txt", "b.txt"]
    expected = score_text(ready, TEXT, stride=16)
    entry = found["results"]["a.txt"]
    assert entry == {
        "tokens": expected.tokens,
        "bytes": len(TEXT.encode()),
        "loss": pytest.approx(expected.loss),
        "perplexity": pytest.approx(expected.perplexity),
        "bits_per_byte": pytest.approx(expected.bits_per_byte),
        "exact": True,
    }
    assert found["results"]["b.txt"]["bytes"] == 11  # line ends count as they are
    assert found["config"] == {"checkpoint": f"{keys['load']}/global_step2", "iteration": 2, "seq_length": 32, "eval_stride": 16, "dtype": "float32"}
    assert "scoring a.txt: 0.0 MB" in progress
    for shown in ("text file", "tokens", "bytes", "loss", "perplexity", "bits per byte", "a.txt", f"{expected.bits_per_byte:.4f}"):
        assert shown in screen


def test_stride(keys: dict[str, Any], ready: ReadyModel) -> None:
    found, _, _ = run(keys, eval_stride=1)
    assert found["results"]["a.txt"]["loss"] == pytest.approx(score_text(ready, TEXT, stride=1).loss)
    with pytest.raises(ConfigError, match=r"'eval_stride' = 33: must be at most seq_length \(32\); a larger step would skip tokens"):
        run(keys, eval_stride=33)


def test_the_results_file_has_neox_name(keys: dict[str, Any], tmp_path: Path) -> None:
    run(keys, eval_results_prefix="runs/mine")
    (path,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"mine_eval_results_\d\d-\d\d-\d{4}-\d\d-\d\d-\d\d\.json", path.name)
    assert results_path("").name.startswith("eval_results_")


def test_no_files_named(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'eval_text_files' must be given: the text files to measure"):
        run(keys, eval_text_files=[])


def test_bad_files_are_found_before_the_model_is_loaded(keys: dict[str, Any]) -> None:
    with pytest.raises(InferenceError, match=r"eval_text_files: none\.txt cannot be read: No such file or directory"):
        run(keys, load="nowhere", eval_text_files=["a.txt", "none.txt"])
    Path("empty.txt").touch()
    with pytest.raises(InferenceError, match=r"eval_text_files: empty\.txt is empty: there is nothing to predict"):
        run(keys, load="nowhere", eval_text_files=["empty.txt"])
    Path("latin.txt").write_bytes(b"\xff")
    with pytest.raises(InferenceError, match=r"latin\.txt is not UTF-8 text \(byte 0 is 0xff\)"):
        run(keys, load="nowhere", eval_text_files=["latin.txt"])


def test_text_that_the_tokenizer_loses_is_pointed_out(
    keys: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    Path("zero.txt").write_text("a\0b")
    with caplog.at_level(logging.WARNING, "megatron"):
        found, _, _ = run(keys, eval_text_files=["zero.txt"])
    assert not found["results"]["zero.txt"]["exact"]
    assert "zero.txt: the tokenizer changes this text (decoding its tokens does not give the same text)" in caplog.text


def test_results_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InferenceError, match=r"eval_results_prefix: .* cannot be written: (File exists|Not a directory)"):
        write_results(tmp_path / "file" / "results.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_lines_are_measured_without_their_braces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, lines, packed = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "part-0"
    plain.write_bytes(b"one\r\n\r\ntwo")
    content = b'{"text": "one"}\n{"text": "two"}\n'
    lines.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    caplog.set_level(logging.INFO)
    names = [str(plain), str(lines), str(packed)]
    assert list(read_texts(EvaluationConfig(eval_text_files=names)).values()) == ["one\r\n\r\ntwo", "one\n\ntwo", "one\n\ntwo"]
    assert f"{lines} is read as JSON lines, as its first bytes say; eval_text_format: text stores it as plain text." in caplog.text
    assert f"{lines} holds 2 texts under 'text'" in caplog.text
    assert read_texts(EvaluationConfig(eval_text_files=[str(lines)], eval_text_format="text")) == {str(lines): content.decode()}
    with pytest.raises(
        InferenceError, match=r"no key 'body'; the keys with text are: text \(choose one with eval_jsonl_key\)\. To measure the file as it is"
    ):
        read_texts(EvaluationConfig(eval_text_files=[str(lines)], eval_jsonl_key="body"))


def test_int8_weights_are_scored_beside_the_others(keys: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        results, table, _ = run(keys, inference_weights="int8")
    assert "a.txt, int8 weights" in table
    change = re.search(r"a\.txt: int8 weights change the perplexity by ([+-]\d+\.\d+) %", caplog.text)
    assert change is not None
    of_text = results["results"]["a.txt"]
    assert of_text["perplexity_int8"] != of_text["perplexity"]
    assert float(change[1]) == pytest.approx(100 * (of_text["perplexity_int8"] / of_text["perplexity"] - 1), abs=1e-3)
    assert abs(float(change[1])) < 5


def test_int8_weights_of_a_model_that_is_not_served(keys: dict[str, Any]) -> None:
    with pytest.raises(InferenceError, match="inference_weights: int8 cannot be measured"):
        run(keys, inference_weights="int8", kernel_backends={}, precision="fp16")
