"""tools/bench/moe_step.py: it runs, and says what its report is read for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts import run_script
from tests.training.runs import outer_environment


@pytest.fixture(scope="module", autouse=True)
def modules(repository: Path) -> Iterator[None]:
    """The scripts of tools/bench import each other by name."""
    sys.path.insert(0, str(repository / "tools/bench"))
    yield
    sys.path.remove(str(repository / "tools/bench"))


def report_of(repository: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """What the script prints with --json."""
    words = ("tools/bench/moe_step.py", "--tiny", "--rounds", "1", "--json", *arguments)
    environment = {**outer_environment(), "PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu"}
    finished = run_script(*words, folder=repository, environment=environment, timeout=170, outputs=folder)
    assert finished.returncode == 0, finished.stderr
    report: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return report


def test_every_side_has_its_row(repository: Path, tmp_path: Path) -> None:
    given = ("--precision", "fp32", "--no-memory", "--quickstart-steps", "0", "--output", str(tmp_path / "new"))
    report = report_of(repository, tmp_path, *given)
    rows = {row["side"]: row for row in report["rows"]}
    ours = ["ours", "ours, StructMoE", "ours, plain with as many parameters"]
    theirs = ["Hugging Face grouped_mm", "Hugging Face eager"]
    assert list(rows) == [*ours, *theirs]
    assert all(row["tokens_per_second"] == pytest.approx(32 / row["ms"] * 1000) for row in rows.values())
    assert max(rows[name]["over_best"] for name in theirs) == 1.0
    assert rows["ours"]["over_best"] == pytest.approx(rows["ours"]["tokens_per_second"] / max(rows[name]["tokens_per_second"] for name in theirs))
    assert rows["ours"]["parameters"] == pytest.approx(rows["Hugging Face eager"]["parameters"], rel=0.01)
    assert report["quickstart"] is None
    assert (tmp_path / "new/moe_step.md").read_text().count("\n| ours") == 3
    assert (tmp_path / "new/moe_step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_bf16_and_the_quickstart(repository: Path, tmp_path: Path) -> None:
    report = report_of(repository, tmp_path, "--quickstart-steps", "3")
    rows = {(row["side"], row["precision"]): row for row in report["rows"]}
    assert report["quickstart"]["steps"] == 3
    assert report["quickstart"]["ratio"] > 0
    assert report["quickstart"]["largest_loss_difference"] <= 1e-3
    for side in ("ours", "Hugging Face grouped_mm"):
        assert rows[side, "fp32"]["peak_mib"] > rows[side, "fp32"]["before_mib"] > 50
    assert rows["ours", "bf16"]["peak_mib"] is None
    assert ("Hugging Face grouped_mm, autocast", "bf16") in rows


def test_structmoe_and_the_wider_plain_model_have_as_many_parameters() -> None:
    """Counted by hand for the full shape: a layer's 8 experts with 16 LoREs of rank 32 and their routers, and 12 plain experts."""
    from moe_bench.steps import FULL, LORES

    expert, lore = 3 * FULL.width * FULL.hidden, LORES["moe_lore_rank"] * (FULL.width + FULL.hidden)
    structmoe = FULL.experts * (expert + LORES["moe_num_lores"] * (lore + FULL.width))
    assert structmoe == pytest.approx(12 * expert, rel=0.01)


def test_fewer_tokens_are_shorter_sequences_and_then_fewer() -> None:
    from moe_bench.steps import FULL

    assert [tuple(FULL.text(tokens).shape) for tokens in (None, 1024, 256, 1)] == [(4, 513), (2, 513), (1, 257), (1, 3)]


def test_findings_are_sentences_about_the_rows() -> None:
    from moe_bench.step_report import findings
    from moe_bench.step_times import Row

    rows = [
        Row("ours", "bf16", 100, 100.0, 20.0, 2.0, 900.0, 200.0, ""),
        Row("ours, StructMoE", "bf16", 150, 130.0, 15.0, 1.5, 1000.0, 200.0, ""),
        Row("ours, plain with as many parameters", "bf16", 150, 100.0, 20.0, 2.0, 1000.0, 200.0, ""),
        Row("Hugging Face grouped_mm", "bf16", 100, 200.0, 10.0, 1.0, 1000.0, 300.0, ""),
        Row("Hugging Face eager", "bf16", 100, 400.0, 5.0, 0.5, None, None, "estimated: 8 tokens took 1 s"),
    ]
    assert findings(rows) == [
        "bf16: ours has 2 times the tokens/s of the best Hugging Face side (Hugging Face grouped_mm).",
        "bf16: peak memory, ours / Hugging Face grouped_mm: 0.9; without Python and libraries 1.",
        "bf16: a StructMoE step takes 1.3 times the step with plain experts of the same width.",
        "bf16: a StructMoE step takes 1.3 times the step of the plain model with as many parameters.",
        "bf16: peak memory, ours, StructMoE / ours, plain with as many parameters: 1; without Python and libraries 1.",
    ]


def test_speeches_fill_the_batches() -> None:
    from moe_bench.step_times import speech_texts

    texts = speech_texts(3, 2, 9)
    assert [tuple(text.shape) for text in texts] == [(2, 9)] * 3
    assert texts[0].dtype == torch.int64
    assert not torch.equal(texts[0], texts[1])
