"""`prepare_data.py --by-file`: parts, machines, interruptions, and what is noticed when something has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.parts.by_file import PartsReport, describe_parts, is_by_file, prepare_by_file
from megatron.data.preprocessing.bpe import train_bpe
from megatron.data.preprocessing.prepare import PrepareOptions, prepare
from megatron.data.preprocessing.prepare_arguments import parse
from megatron.data.preprocessing.prepared import Prepared
from megatron.data.progress import build_reporter
from tests.data.parts.hub_server import hub

QUIET = build_reporter(quiet=True)
TEXTS = [f"Document {number} tells how {number * number} people form a more perfect union. " * (number % 4 + 1) for number in range(120)]
FILES = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parquet files of 30 documents, and a tokenizer beside their folder."""
    pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("corpus")
    train_bpe(TEXTS, 400, folder / "tokenizer.json")
    (folder / "in" / "sample" / "10BT").mkdir(parents=True)
    for number in range(FILES):
        rows = [{"text": text, "token_count": len(text) // 4} for text in TEXTS[number * 30 : number * 30 + 30]]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "in" / "sample" / "10BT" / f"{number:03d}_00000.parquet", row_group_size=7)
    return folder


@pytest.fixture
def options(corpus: Path, tmp_path: Path) -> Callable[..., PrepareOptions]:
    def make(**changes: Any) -> PrepareOptions:
        given = {"inputs": (str(corpus / "in"),), "tokenizer_file": str(corpus / "tokenizer.json"), "directory": str(tmp_path), "workers": 1}
        return PrepareOptions(**{**given, "name": "c", "by_file": True, **changes})

    return make


def pair(folder: Path) -> tuple[bytes, bytes]:
    (index,) = folder.glob("*.idx")
    return index.with_suffix(".bin").read_bytes(), index.read_bytes()


def plain(options: PrepareOptions) -> tuple[bytes, bytes]:
    """What the ordinary preparation makes of it."""
    made = prepare(PrepareOptions(**{**vars(options), "name": "plain", "by_file": None, "valid_fraction": 0.0, "test_fraction": 0.0}), QUIET)
    return pair(made.folder)


@pytest.mark.parametrize("limit", [{}, {"max_tokens": 1500}, {"max_tokens": 10}, {"max_documents": 61}, {"max_documents": 90, "max_tokens": 10**6}])
def test_the_pair_is_that_of_the_ordinary_preparation(options: Callable[..., PrepareOptions], limit: dict[str, int]) -> None:
    if limit == {"max_tokens": 10}:
        limit = {"max_tokens": len(TEXTS[0])}
    made = prepare_by_file(options(**limit), QUIET)
    assert isinstance(made, Prepared)
    assert pair(made.folder) == plain(options(**limit))
    assert made.manifest["splits"]["train"]["tokens"] == IndexedDataset(made.folder / "c_text_document").num_tokens
    assert not made.folder.with_name("c.parts").exists()
    again = prepare_by_file(options(**limit, verify=True), QUIET)
    assert isinstance(again, Prepared)
    assert again.up_to_date


def test_machines_share_the_files_and_the_parts_are_joined(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    for number in (2, 1, 3):
        report = prepare_by_file(options(part=(number, 3), directory=str(tmp_path / f"machine{number}")), QUIET)
        assert isinstance(report, PartsReport)
        assert report.made == (2 if number == 1 else 1)
        assert report.left == FILES - report.made
    (tmp_path / "c.parts").mkdir()
    for path in tmp_path.glob("machine*/c.parts/*"):
        (tmp_path / "c.parts" / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c.parts").glob("*.bin")}
    assert len(before) == FILES
    made = prepare_by_file(options(keep_parts=True), QUIET)
    assert isinstance(made, Prepared)
    assert pair(made.folder) == plain(options())
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c.parts").glob("*.bin")} == before  # none was made again


def test_what_has_changed_is_noticed(options: Callable[..., PrepareOptions], corpus: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(TEXTS[number])
    mine = {"inputs": (str(texts),)}
    prepare_by_file(options(part=(1, 1), **mine), QUIET)
    os.utime(texts / "0.txt", (1, 1))  # another time, the same content
    (texts / "1.txt").write_text(TEXTS[1][::-1])
    report = prepare_by_file(options(part=(1, 1), **mine), QUIET)
    assert isinstance(report, PartsReport)
    assert report.made == 1
    (texts / "1.txt").write_text(TEXTS[7])
    made = prepare_by_file(options(**mine, keep_parts=True), QUIET)
    assert isinstance(made, Prepared)
    assert made.left_out[0].startswith("note: the part of 1.txt is made again, because the input file ha")
    train_bpe(TEXTS, 300, tmp_path / "other.json")
    with pytest.raises(DatasetError, match=r"c was prepared differently \(.*tokenizer"):
        prepare_by_file(options(**mine, tokenizer_file=str(tmp_path / "other.json")), QUIET)
    for path in made.folder.iterdir():
        path.unlink()
    made.folder.rmdir()
    with pytest.raises(DatasetError, match=r"c\.parts holds parts made with other settings \(tokenizer\)\. --force makes them again"):
        prepare_by_file(options(**mine, tokenizer_file=str(tmp_path / "other.json")), QUIET)
    report = prepare_by_file(options(**mine, verify=True), QUIET)
    assert isinstance(report, PartsReport)
    assert (report.made, report.left) == (0, 0)
    assert "All checksums are those that were written down" in describe_parts(report)
    part = tmp_path / "c.parts" / "2.txt.bin"
    part.write_bytes(b"\x07" + part.read_bytes()[1:])
    with pytest.raises(DatasetError, match=r"2\.txt\.bin is damaged: its checksum is not the one that was written down\. Remove .*2\.txt\.json"):
        prepare_by_file(options(**mine, verify=True), QUIET)
    part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(DatasetError, match=r"2\.txt is damaged: a file of this part is missing or cut short"):
        prepare_by_file(options(**mine, verify=True), QUIET)
    made = prepare_by_file(options(**mine, tokenizer_file=str(tmp_path / "other.json"), force=True), QUIET)
    assert isinstance(made, Prepared)
    assert made.manifest["vocab_size"] == 300


def test_verify_makes_nothing(options: Callable[..., PrepareOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(2):
        (texts / f"{number}.txt").write_text(TEXTS[number])
    mine = options(inputs=(str(texts),))
    verify = replace(mine, verify=True)
    with pytest.raises(DatasetError, match=r"--verify: neither .*c nor .*c\.parts is there, so there is nothing to check"):
        prepare_by_file(verify, QUIET)
    assert not (tmp_path / "c.parts").exists()
    prepare_by_file(replace(mine, part=(1, 2)), QUIET)
    report = prepare_by_file(verify, QUIET)
    assert isinstance(report, PartsReport)
    assert (report.made, report.whole, report.left) == (0, 1, 1)
    assert "1 more parts are not made yet" in describe_parts(report)
    (texts / "0.txt").write_text("other text")
    with pytest.raises(DatasetError, match=r"0\.txt is no longer the part of .*0\.txt: the input file ha"):
        prepare_by_file(verify, QUIET)
    with pytest.raises(SystemExit):
        parse(["x.txt", "--verify", "--plan"])
    assert "--verify only compares checksums; leave --plan out" in capsys.readouterr().err


def test_a_damaged_pair_is_found(options: Callable[..., PrepareOptions]) -> None:
    made = prepare_by_file(options(), QUIET)
    assert isinstance(made, Prepared)
    path = made.folder / "c_text_document.bin"
    path.write_bytes(b"\x07" + path.read_bytes()[1:])
    with pytest.raises(DatasetError, match=r"c_text_document\.bin is damaged: its checksum"):
        prepare_by_file(options(verify=True), QUIET)


def test_a_file_that_cannot_be_read_keeps_the_other_parts(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.jsonl").write_text('{"text": "good and sound"}\n')
    (tmp_path / "bad" / "1.jsonl").write_text('{"text": "good"}\n{broken\n')
    with pytest.raises(DatasetError, match=r"1\.jsonl:2: "):
        prepare_by_file(options(inputs=(str(tmp_path / "bad"),)), QUIET)
    assert sorted(path.name for path in (tmp_path / "c.parts").glob("*.json")) == ["0.jsonl.json", "settings.json"]
    made = prepare_by_file(options(inputs=(str(tmp_path / "bad"),), on_error="skip", force=True), QUIET)
    assert isinstance(made, Prepared)
    assert made.manifest["left_out"] == {"broken JSON": 1}


def test_what_cannot_be_done_by_file_is_refused(options: Callable[..., PrepareOptions]) -> None:
    with pytest.raises(DatasetError, match=r"--by-file tokenises each file for itself, so it needs a tokenizer"):
        prepare_by_file(options(tokenizer_file=None), QUIET)
    with pytest.raises(DatasetError, match=r"--max-bytes cannot be used with --by-file"):
        prepare_by_file(options(max_bytes=10**6), QUIET)
    with pytest.raises(DatasetError, match=r"--by-file holds nothing out"):
        prepare_by_file(options(valid_fraction=0.1), QUIET)
    with pytest.raises(DatasetError, match=r"--subset x: only fineweb, fineweb-edu have subsets"):
        prepare_by_file(options(subset="x"), QUIET)
    plain(options())
    with pytest.raises(DatasetError, match=r"plain was not prepared by file, so there are no checksums to compare"):
        prepare_by_file(options(name="plain", verify=True), QUIET)
    with pytest.raises(DatasetError, match=r"--by-file needs files or folders"):
        prepare_by_file(options(inputs=()), QUIET)


def test_when_it_is_chosen() -> None:
    assert is_by_file(parse(["fineweb", "--tokens", "100B"]))
    assert is_by_file(parse(["fineweb-edu", "--max-tokens", "all"]))
    assert is_by_file(parse(["mine", "--part", "2/8"]))
    assert not is_by_file(parse(["fineweb", "--tokens", "10M"]))
    assert not is_by_file(parse(["fineweb", "--tokens", "100B", "--no-by-file"]))
    assert not is_by_file(parse(["mine", "--tokens", "100B"]))
    assert parse(["mine", "--tokens", "2k"]).limits.numbers() == parse(["mine", "--max-tokens", "2k"]).limits.numbers() == {"tokens": 2000}


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/x", "-1/2"])
def test_a_wrong_share_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["mine", f"--part={text}"])
    assert "give the number of this machine and of all, such as 2/8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine", "--json"], "--json belongs to --plan; give both or neither"),
        (["mine", "--sample", "a"], "--sample belongs to --plan"),
        (["mine", "--no-by-file", "--part", "1/2"], "--part and --no-by-file exclude each other"),
        (["mine", "--no-by-file", "--keep-parts"], "--keep-parts and --no-by-file exclude each other"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def command(repository: Path, corpus: Path, folder: Path, *more: str) -> list[str]:
    given = ["-v", str(corpus / "tokenizer.json"), "-d", str(folder), "--by-file", "--workers", "2", *more]
    return [sys.executable, str(repository / "prepare_data.py"), *given]


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, repository: Path, options: Callable[..., PrepareOptions]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):  # the later ones take long enough to be killed in their middle
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS * (1 if number < 2 else 30)]
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(lines))
    asked = command(repository, corpus, tmp_path, str(tmp_path / "in"), "--name", "c")
    running = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    parts = tmp_path / "c.parts"
    while not (list(parts.glob("*.jsonl.json")) and list(parts.glob("*.bin.partial"))):
        assert running.poll() is None
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.jsonl.json")}
    assert 0 < len(kept) < 4
    assert not (tmp_path / "c").exists()
    done = subprocess.run([*asked, "--keep-parts"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {name: (parts / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(parts.glob("*.partial"))
    assert pair(tmp_path / "c") == plain(options(inputs=(str(tmp_path / "in"),)))


@pytest.mark.timeout(600)
def test_fineweb_from_a_hub_on_this_machine(corpus: Path, tmp_path: Path, repository: Path, options: Callable[..., PrepareOptions]) -> None:
    """A small server answers in the hub's place. It breaks one download off, and the real package huggingface_hub goes on with it."""
    pytest.importorskip("huggingface_hub", reason="the package huggingface_hub is not installed")
    with hub("HuggingFaceFW/fineweb", corpus / "in") as server:
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        asked = command(repository, corpus, tmp_path, "fineweb", "--subset", "sample-10BT", "--max-documents", "100")
        planned = subprocess.run([*asked, "--plan", "--json"], env=environment, capture_output=True, text=True, check=False)
        assert planned.returncode == 0, planned.stderr
        facts = json.loads(planned.stdout)
        assert facts["files"] == FILES
        assert facts["sample"]["tokens_a_gpt2_token"]["value"] > 0
        assert not list(tmp_path.glob("fineweb*"))
        server.cut = 1000
        done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [path for command, path, _ in server.requests if command == "GET" and path.endswith("000_00000.parquet")]
    assert pair(tmp_path / "fineweb") == plain(options(max_documents=100))
    manifest = json.loads((tmp_path / "fineweb" / "prepared.json").read_text())
    assert len(manifest["revision"]) == 40
