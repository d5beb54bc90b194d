"""`prepare_data.py --plan` against what the preparation then makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed import DatasetError
from megatron.data.parts import estimate as estimate_module
from megatron.data.parts.estimate import ratio, student
from megatron.data.parts.files import subset_for
from megatron.data.parts.plan import describe_plan, plan
from megatron.data.preprocessing.bpe import train_bpe
from megatron.data.preprocessing.prepare import PrepareOptions, prepare
from megatron.data.progress import build_reporter

QUIET = build_reporter(quiet=True)
TEXTS = [
    f"Text {number}: " + " ".join(f"{number * place % 97} people form a more perfect union" for place in range(number % 9 + 1))
    for number in range(600)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS, 400, path)
    return path


@pytest.fixture
def options(tmp_path: Path, tokenizer: Path) -> Callable[..., PrepareOptions]:
    def make(*inputs: Path | str, **changes: Any) -> PrepareOptions:
        given = {"inputs": tuple(map(str, inputs)), "tokenizer_file": str(tokenizer), "directory": str(tmp_path / "data"), "workers": 2}
        return PrepareOptions(**{**given, **changes})

    return make


def parquet(folder: Path) -> Path:
    pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    for number in range(3):
        rows = [{"text": text, "token_count": len(text) // 5} for text in TEXTS[number::3]]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{number}.parquet", row_group_size=10)
    return folder


def jsonl(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.mark.parametrize("write", [parquet, jsonl])
def test_the_estimate_holds_what_is_made(write: Callable[[Path], Path], options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    found = plan(options(folder), QUIET, by_file=False)
    assert not (tmp_path / "data").exists()
    made = prepare(options(folder, valid_fraction=0.0, test_fraction=0.0), QUIET)
    totals = made.manifest["splits"]["train"]
    assert found.corpus_tokens_error is not None
    assert abs(found.corpus_tokens - totals["tokens"]) <= 2 * found.corpus_tokens_error + 1
    assert found.tokens == pytest.approx(totals["tokens"], rel=0.1)
    assert found.text_bytes == pytest.approx(totals["bytes"], rel=0.1)
    assert found.documents == pytest.approx(totals["documents"], rel=0.1)
    index, binary = (sum(size for name, size in made.manifest["files"].items() if name.endswith(end)) for end in (".idx", ".bin"))
    assert found.bin_bytes == pytest.approx(binary, rel=0.1)
    assert found.idx_bytes == pytest.approx(index, rel=0.1)
    assert found.core_hours > 0


def test_a_limit_takes_a_share(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    folder = parquet(tmp_path / "in")
    whole, part = plan(options(folder), QUIET, by_file=True), plan(options(folder, max_tokens=5000), QUIET, by_file=True)
    assert part.tokens == pytest.approx(5000)
    assert part.bin_bytes == pytest.approx(10_000)
    assert part.peak_bytes == pytest.approx(2 * (part.bin_bytes + (part.idx_bytes or 0)))
    assert part.core_hours < whole.core_hours
    assert part.files_needed == 1
    more = plan(options(folder, max_tokens=10**9), QUIET, by_file=True)
    assert "which may be fewer than the 1,000,000,000 that are wanted" in more.notes[0]


def test_what_is_shown(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    found = plan(options(parquet(tmp_path / "in"), max_tokens=5000), QUIET, by_file=True)
    text = describe_plan(found, as_json=False)
    assert "wanted    5,000 tokens" in text
    assert "tokens for each GPT-2 token that the corpus states" in text
    assert "nothing; 1 of 3 files" in text
    assert json.loads(describe_plan(found, as_json=True))["dtype"] == "uint16"


def test_fineweb_without_a_network(options: Callable[..., PrepareOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="the package huggingface_hub is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = options("fineweb", max_tokens=100 * 10**9, sample=(str(parquet(tmp_path / "in")),), workers=64)
    found = plan(asked, QUIET, by_file=True)
    assert found.notes[0].startswith("HuggingFaceFW/fineweb")
    assert found.tokens == pytest.approx(100e9)
    assert found.bin_bytes == pytest.approx(200e9)
    assert found.hours == pytest.approx(found.core_hours / 64)
    assert set(found.subsets) == {"sample-10BT", "sample-100BT", "sample-350BT", "default"}
    assert not found.subsets["sample-10BT"]["suffices"]
    ratio = found.sample["tokens_a_gpt2_token"]["value"]
    assert found.subsets["sample-100BT"]["tokens"] == pytest.approx(100e9 * ratio)
    with pytest.raises(DatasetError, match=r"The card does not state the size of fineweb-edu \(sample-350BT\), so there is no plan without the hub"):
        plan(options("fineweb-edu", max_tokens=100 * 10**9), QUIET, by_file=True)


def test_a_plan_needs_a_tokenizer_and_files(options: Callable[..., PrepareOptions]) -> None:
    with pytest.raises(DatasetError, match=r"--plan counts tokens, so it needs a tokenizer"):
        plan(options("sotu", tokenizer_file=None), QUIET, by_file=False)
    with pytest.raises(DatasetError, match=r"--plan works for files that lie on this machine and for fineweb, fineweb-edu; c4 is downloaded"):
        plan(options("c4", max_documents=5), QUIET, by_file=False)


def test_the_smallest_subset_that_surely_suffices() -> None:
    assert subset_for("fineweb", 10**9, None) == "sample-10BT"
    assert subset_for("fineweb", 80 * 10**9, None) == "sample-100BT"
    assert subset_for("fineweb", 100 * 10**9, None) == "sample-350BT"
    assert subset_for("fineweb", 10**12, None) == "default"
    assert subset_for("fineweb", 10**12, "sample-10BT") == "sample-10BT"


def test_the_interval_of_a_ratio() -> None:
    """By hand: sums 6 and 3, residuals 1 - 2, 2 - 2, 3 - 2."""
    found = ratio([1, 2, 3], [1, 1, 1])
    assert found.value == 2
    assert found.error == pytest.approx(student(2) * (2 * 3 / 2) ** 0.5 / 3)
    assert ratio([5], [2]).error is None
    assert student(10) == pytest.approx(2.228, rel=0.01)
    assert student(31) == pytest.approx(2.040, rel=0.01)


def test_the_sample_is_the_same_each_time_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.data.parts.files import local_files

    monkeypatch.setattr(estimate_module, "BYTES_A_CLUSTER", 500)
    files = local_files([str(parquet(tmp_path / "in"))])
    first, second = (list(estimate_module.sample(files, "text", estimate_module.local_file)) for _ in range(2))
    assert first == second
    assert 3 <= len(first) <= estimate_module.CLUSTERS
    assert len(files) == 3
