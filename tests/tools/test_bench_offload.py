"""tools/bench/offload.py: the tables have their rows, f/c follows the read bandwidth, and a setting's peak memory is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.analysis.offload import measure_report
from megatron.analysis.offload.measure import Work, measure, measure_here
from tests.inference.offload.conftest import MIXTRAL_LIKE, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    keys = write_model(folder / "run", MIXTRAL_LIKE)
    (folder / "model.yml").write_text(yaml.safe_dump(keys))
    (folder / "text.txt").write_text("Fellow citizens\n\nThe Union\n\n\n\nPeace\n")
    return folder, keys


def test_the_tables(
    model: tuple[Path, dict[str, Any]],
    tool: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder, _ = model
    monkeypatch.setattr(measure_report, "measure", measure_here)
    words = [str(folder / "model.yml"), "--text", str(folder / "text.txt"), "--tokens", "6", "--threads", "1", "--bandwidth", "2MB"]
    words += ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert tool("tools/bench/offload.py").main(words) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Table 3", "Table 4", "model + Offl", "ΔUni", "12.5%"))
    (found,) = json.loads((tmp_path / "out.json").read_text())["models"]
    shares = found["by_share"]
    assert [shares[share]["slots"] for share in ("1", "0.5", "0.25", "0.125")] == [None, 4, 2, 2]
    assert shares["0.5"]["counters"]["hit_rate"] > shares["0.25"]["counters"]["hit_rate"]
    # an expert of 3 x 32 x 64 numbers of 4 bytes; two of them in each of three layers, at 2 MB/s
    assert found["on_demand"]["fetch_seconds"] == pytest.approx(3 * 32 * 64 * 4 * 2 * 3 / 2e6, rel=0.3)
    assert found["fetch_to_compute"] == pytest.approx(found["on_demand"]["fetch_seconds"] * found["resident"]["tokens_per_second"])
    assert found["on_demand"]["exrep"] == pytest.approx(found["resident"]["exrep"])  # the same tokens
    assert found["on_demand"]["counters"]["replacement_ratio"] > 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_setting_in_a_process_of_its_own(model: tuple[Path, dict[str, Any]]) -> None:
    found = measure(Work(model[1], ["Fellow citizens"], 4, 4, 1, {"slots": 2, "policy": "lru"}))
    assert found.peak_bytes < 400e6
    assert found.counters["calls"] == 3 * 3
    assert found.counters["selections"] == 3 * 3 * 2


def test_no_prompt_is_long_enough(model: tuple[Path, dict[str, Any]], tool: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = model
    words = [str(folder / "model.yml"), "--text", str(folder / "text.txt"), "--prompt-tokens", "20"]
    assert tool("tools/bench/offload.py").main(words) == 1
    assert "No text has 20 tokens, so there is no prompt. Give longer texts." in capsys.readouterr().err
