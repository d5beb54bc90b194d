"""prepare_data.py from text to files: what it writes, that it writes it whole or not at all, and what it says otherwise."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from io import StringIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from megatron.config.machine import usable_cores
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.loader import SamplePlan, batches, build_data
from megatron.data.preprocessing.bpe import train_bpe
from megatron.data.preprocessing.prepare import BYTES_A_WORKER, PrepareOptions, default_workers, prepare
from megatron.data.preprocessing.prepare_arguments import parse
from megatron.data.preprocessing.prepared import describe
from megatron.data.progress import LineReporter, TerminalReporter, build_reporter
from megatron.data.staging import publish, staging_folder
from megatron.data.tokenizer import TokenizerError, build_tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
WORDS = ("we", "the", "people", "of", "united", "states", "in", "order", "to", "form", "more", "perfect", "union", "establish", "justice")
FILES = [
    "prepared.json",
    *(f"{split}{suffix}" for split in ("test", "train", "valid") for suffix in (".txt", "_text_document.bin", "_text_document.idx")),
    "tokenizer.json",
]
FILES.remove("train.txt")


def sentences(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=12)) + ".\n" for _ in range(count))


@pytest.fixture
def reporter() -> LineReporter:
    return LineReporter(Console(file=StringIO()))


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., PrepareOptions]:
    """200 short documents as JSON lines, a vocabulary of 300."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": sentences(3, seed)}) + "\n" for seed in range(200)))

    def make(**changes: Any) -> PrepareOptions:
        values: dict[str, Any] = {"inputs": (str(path),), "directory": str(tmp_path / "data"), "vocab_size": 300}
        return PrepareOptions(**{**values, **changes})

    return make


@pytest.fixture
def command(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("prepare_data.py")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written_decodes_to_the_text(options: Callable[..., PrepareOptions], reporter: LineReporter, data_config: Callable[..., Any]) -> None:
    prepared = prepare(options(), reporter)
    folder = prepared.folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    tokenizer = build_tokenizer(data_config(tokenizer_type="HFTokenizer", vocab_file=str(folder / "tokenizer.json")))
    assert (tokenizer.vocab_size, tokenizer.eod) == (300, 0)
    texts = {}
    for split, total in prepared.manifest["splits"].items():
        dataset = IndexedDataset(folder / f"{split}_text_document")
        documents = [dataset.get(i).tolist() for i in range(len(dataset))]
        assert all(document[-1] == 0 and 0 not in document[:-1] for document in documents)
        texts[split] = [tokenizer.decode(document) for document in documents]
        assert total == {"documents": len(documents), "bytes": sum(len(text.encode()) for text in texts[split]), "tokens": dataset.num_tokens}
    assert sorted(chain(*texts.values())) == sorted(sentences(3, seed) for seed in range(200))
    assert {split: len(part) for split, part in texts.items()} == {"train": 196, "valid": 2, "test": 2}
    assert (folder / "test.txt").read_text() == "\n\n".join(texts["test"])
    paths: dict[str, Any] = {f"{split}_data_paths": [str(folder / f"{split}_text_document")] for split in texts}
    plan = SamplePlan(train_samples=20, valid_samples=4, test_samples=4)
    data = build_data(data_config(**paths), seq_length=16, plan=plan, seed=1, vocab_size=300)
    assert data.train is not None
    assert next(batches(data.train, micro_batch=2))["text"].shape == (2, 17)


def test_the_summary_names_numbers_and_keys(options: Callable[..., PrepareOptions], reporter: LineReporter) -> None:
    prepared = prepare(options(), reporter)
    text = describe(prepared)
    assert text.startswith(f"{prepared.folder} written\n")
    assert f'  valid_data_paths: ["{prepared.folder}/valid_text_document"]\n' in text
    assert f'  tokenizer_type: HFTokenizer\n  vocab_file: "{prepared.folder}/tokenizer.json"' in text
    assert any(line.split()[:2] == ["train", "196"] for line in text.splitlines())
    nothing_held_out = prepare(options(name="all", valid_fraction=0.0, test_fraction=0.0), reporter)
    assert f'  data_path: "{nothing_held_out.folder}/all_text_document"\n  (nothing is held out: `split` divides it' in describe(nothing_held_out)
    assert sorted(path.name for path in nothing_held_out.folder.iterdir()) == [
        "all_text_document.bin",
        "all_text_document.idx",
        "prepared.json",
        "tokenizer.json",
    ]


def test_a_second_run_does_nothing_and_force_gives_the_same_bytes(options: Callable[..., PrepareOptions], reporter: LineReporter) -> None:
    first = prepare(options(), reporter)
    before = content(first.folder)
    times = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(options(), reporter)
    assert second.up_to_date
    assert describe(second).startswith(f"{first.folder} is up to date\n")
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times
    (first.folder / "index_maps").mkdir()
    assert not prepare(options(force=True), reporter).up_to_date
    assert content(first.folder) == before


def test_several_processes_write_the_same_bytes(
    options: Callable[..., PrepareOptions], reporter: LineReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.data.preprocessing.encode.BATCH_BYTES", 3000)
    one, two = prepare(options(name="one", workers=1), reporter), prepare(options(name="two", workers=2), reporter)
    expected, found = content(one.folder), content(two.folder)
    assert set(found) == set(expected)
    assert all(found[name] == expected[name] for name in expected if name != "prepared.json")
    with pytest.raises(DatasetError, match="--workers -1: give 1 or more, or 0 to choose by the amount of text"):
        prepare(options(name="none", workers=-1), reporter)
    assert [default_workers(size) for size in (0, BYTES_A_WORKER, 2 * BYTES_A_WORKER - 1)] == [1, 1, 1]
    assert default_workers(10**12) == usable_cores()


def test_other_settings_or_input_are_not_written_over(options: Callable[..., PrepareOptions], reporter: LineReporter) -> None:
    first = prepare(options(), reporter)
    with pytest.raises(
        DatasetError, match=r"corpus was prepared differently \(vocab_size was 300, now 310\); --force replaces it, and another --name keeps both"
    ):
        prepare(options(vocab_size=310), reporter)
    with open(first.folder.parent.parent / "corpus.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DatasetError, match=r"prepared differently \(other input\)"):
        prepare(options(), reporter)
    assert prepare(options(force=True, vocab_size=310), reporter).manifest["vocab_size"] == 310
    os.truncate(first.folder / "train_text_document.bin", 10)
    with pytest.raises(DatasetError, match=r"is damaged \(a file is missing or has another size than when it was written\)"):
        prepare(options(vocab_size=310), reporter)
    (first.folder / "prepared.json").write_text("{")
    with pytest.raises(DatasetError, match=r"prepared\.json is damaged; move .* away"):
        prepare(options(), reporter)


def test_what_somebody_else_put_there_is_not_deleted(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path) -> None:
    folder = prepare(options(), reporter).folder
    (folder / "notes.md").write_text("mine")
    with pytest.raises(DatasetError, match=r"corpus holds notes\.md, which prepare_data\.py did not write; move it away"):
        prepare(options(force=True), reporter)
    assert (folder / "notes.md").read_text() == "mine"
    (tmp_path / "data" / "other").write_text("a file")
    with pytest.raises(DatasetError, match="other is a file; choose another --name"):
        prepare(options(name="other"), reporter)
    for name in ("a/b", "..", ""):
        with pytest.raises(DatasetError, match=r"--name '.*': give the name of one folder"):
            prepare(options(name=name, directory=str(tmp_path / "data" / "corpus")), reporter)


def test_a_given_tokenizer_is_used_and_copied(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path) -> None:
    assert train_bpe([sentences(50)], 280, tmp_path / "mine.json") == 280
    prepared = prepare(options(tokenizer_file=str(tmp_path / "mine.json")), reporter)
    assert (prepared.folder / "tokenizer.json").read_bytes() == (tmp_path / "mine.json").read_bytes()
    assert prepared.manifest["vocab_size"] == 280
    tokenizer = json.loads((tmp_path / "mine.json").read_text())
    tokenizer["added_tokens"] = []
    (tmp_path / "no_end.json").write_text(json.dumps(tokenizer).replace("<|endoftext|>", "<start>"))
    with pytest.raises(TokenizerError, match=r"--append-eod needs a token that ends a document, and this tokenizer has none"):
        prepare(options(name="no_end", tokenizer_file=str(tmp_path / "no_end.json")), reporter)
    prepared = prepare(options(name="no_end", tokenizer_file=str(tmp_path / "no_end.json"), append_eod=False), reporter)
    assert 0 not in IndexedDataset(prepared.folder / "train_text_document").get(0)


def test_what_a_tokenizer_is_made_of_goes_into_the_folder(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path) -> None:
    letters = sorted(set("".join(WORDS)) | {".", "\u0120", "\u010a"})
    (tmp_path / "v.json").write_text(json.dumps({entry: number for number, entry in enumerate([*letters, "th", "<end>"])}))
    (tmp_path / "m.txt").write_text("#version: 0.2\nt h\n")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    given = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_file": str(tmp_path / "v.json"), "merge_file": str(tmp_path / "m.txt")}
    prepared = prepare(options(**given), reporter)
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} < set(content(prepared.folder))
    assert f'vocab_file: "{prepared.folder}/vocab.json"\n  merge_file: "{prepared.folder}/merges.txt"' in describe(prepared)
    for path in ("v.json", "m.txt", "tokenizer_config.json"):
        (tmp_path / path).unlink()
    kept = load_tokenizer("GPT2BPETokenizer", prepared.folder / "vocab.json", prepared.folder / "merges.txt")
    document = IndexedDataset(prepared.folder / "train_text_document").get(0).tolist()
    assert document[-1] == kept.eod == len(letters) + 1
    assert kept.decode(document).startswith(tuple(WORDS))


def test_a_tokenizer_that_cannot_be_used_is_said_before_the_text_is_read(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    out = StringIO()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"bad\.json"):
        prepare(options(tokenizer_file=str(tmp_path / "bad.json")), LineReporter(Console(file=out)))
    assert not out.getvalue()


def test_too_little_text_for_every_split_is_all_for_training(reporter: LineReporter, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    prepared = prepare(PrepareOptions(inputs=(str(tmp_path / "a.txt"),), directory=str(tmp_path), vocab_size=300), reporter)
    assert f"  data_path: \"{tmp_path}/a/train_text_document\"\n  split: '1'\n" in describe(prepared)


def test_characters_need_no_tokenizer_file(options: Callable[..., PrepareOptions], reporter: LineReporter) -> None:
    prepared = prepare(options(tokenizer_type="CharLevelTokenizer"), reporter)
    assert "tokenizer.json" not in content(prepared.folder)
    assert prepared.manifest["splits"]["train"]["tokens"] == prepared.manifest["splits"]["train"]["bytes"] + 196
    assert "vocab_file" not in describe(prepared)


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    assert 257 < train_bpe(["banana bandana"], 8192, tmp_path / "t.json") < 280
    with pytest.raises(DatasetError, match=r"--vocab-size 256: give at least 257, for 256 bytes"):
        train_bpe(["x"], 256, tmp_path / "t.json")


def test_broken_input_stops_or_is_counted(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(path.read_text() + "oops\n" * 7)
    with pytest.raises(DatasetError, match=r"corpus\.jsonl:201: not JSON .*\. Nothing was written. Correct the input, or .* --on-error skip"):
        prepare(options(), reporter)
    assert not list((tmp_path / "data").iterdir())
    prepared = prepare(options(on_error="skip"), reporter)
    text = describe(prepared)
    assert sum(total["documents"] for total in prepared.manifest["splits"].values()) == 200
    assert "left out: 7 (broken JSON 7)\n" in text
    assert text.count("corpus.jsonl:20") == 3
    assert text.endswith("  and 4 more")
    path.write_text("oops\n")
    with pytest.raises(DatasetError, match=r"no text in the input\nleft out: 1 \(broken JSON 1\)\n  .*corpus\.jsonl:1: not JSON"):
        prepare(options(on_error="skip", name="none"), reporter)


def test_a_replacement_interrupted_between_its_two_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "corpus"
    with staging_folder(target) as stage:
        (stage / "file").write_text("first")
        publish(stage, target)
    os.rename(target, tmp_path / ".corpus.old")
    with staging_folder(target):
        assert (target / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".corpus", "corpus"))) == ["corpus"]


def test_progress_on_a_terminal_and_elsewhere(options: Callable[..., PrepareOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    out = StringIO()
    prepare(options(name="bars"), TerminalReporter(Console(file=out, force_terminal=True, width=120)))
    assert "tokenising" in out.getvalue()
    assert "tokens/s" in out.getvalue()
    assert "merging into 300 tokens" in out.getvalue()
    out = StringIO()
    monkeypatch.setattr("megatron.data.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("megatron.data.preprocessing.encode.BATCH_BYTES", 1000)
    prepare(options(name="lines"), LineReporter(Console(file=out)))
    lines = out.getvalue().splitlines()
    assert any(line.startswith("tokenising: ") and line.endswith(" s left") for line in lines)
    assert any(line.startswith("reading: ") and line.endswith(" s left") for line in lines)
    assert "tokens/s, done in" in lines[-1]
    assert isinstance(build_reporter(), LineReporter | TerminalReporter)


def test_the_command_line(command: ModuleType, options: Callable[..., PrepareOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = options()
    arguments = [*wanted.inputs, "-d", wanted.directory, "--vocab-size", "300"]
    assert parse(arguments) == wanted
    assert command.main(arguments) == 0
    assert "data/corpus written" in capsys.readouterr().out
    assert command.main([str(tmp_path / "none.txt")]) == 1
    assert capsys.readouterr().err.startswith("no file or folder")
    assert command.main([*arguments, "--name", "x", "--tokenizer-file", str(tmp_path / "none.json")]) == 1
    assert "vocab_file: no file" in capsys.readouterr().err
    (tmp_path / "in_the_way").write_text("")
    assert command.main([*arguments, "-d", str(tmp_path / "in_the_way")]) == 1
    assert "in_the_way" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    command: ModuleType, options: Callable[..., PrepareOptions], small_disk: Path | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": sentences(100, seed)}) + "\n" for seed in range(500)))
    assert command.main([*options().inputs, "-d", str(small_disk / "data"), "-t", "CharLevelTokenizer"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"{small_disk}/data: No space left on device \(disk {small_disk}, .* free\)\.", last), last
    assert not list((small_disk / "data").iterdir())
    (small_disk / "data").rmdir()


def test_control_c_is_a_sentence(options: Callable[..., PrepareOptions], tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": sentences(30, seed)}) + "\n" for seed in range(20_000)))
    command = [sys.executable, str(ROOT / "prepare_data.py"), *options().inputs, "-d", str(tmp_path / "data")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "data" / ".corpus.partial" / "lock").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "Interrupted: nothing was prepared. What was downloaded is kept: the same command continues from there."
    assert "Traceback" not in error
    assert not list((tmp_path / "data").iterdir())


def run_command(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "prepare_data.py"), *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_and_rerun(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path, moments: Sequence[float]) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": sentences(30, seed)}) + "\n" for seed in range(200)))
    expected = content(prepare(options(name="expected"), reporter).folder)
    target = tmp_path / "data" / "corpus"
    started = time.monotonic()
    arguments = [str(tmp_path / "corpus.jsonl"), "-d", str(target.parent), "--vocab-size", "300"]
    assert run_command(*arguments).wait() == 0
    whole_run = time.monotonic() - started
    for moment in moments:
        shutil.rmtree(target)
        process = run_command(*arguments)
        time.sleep(moment * whole_run)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists() or content(target) == expected
        assert run_command(*arguments).wait() == 0
        assert content(target) == expected
    assert sorted(path.name for path in target.parent.iterdir()) == ["corpus", "expected"]


def test_killed_at_any_moment_it_leaves_all_or_nothing(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path) -> None:
    kill_and_rerun(options, reporter, tmp_path, (0.6, 0.8))


@pytest.mark.slow
def test_killed_at_many_moments(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path) -> None:
    draw = random.Random(0)
    kill_and_rerun(options, reporter, tmp_path, [draw.uniform(0.3, 1.1) for _ in range(20)])


@pytest.mark.slow
def test_the_default_corpus(reporter: LineReporter, tmp_path: Path) -> None:
    prepared = prepare(PrepareOptions(directory=str(tmp_path)), reporter)
    splits = prepared.manifest["splits"]
    assert (prepared.folder.name, prepared.manifest["vocab_size"]) == ("sotu", 8192)
    assert 500_000 <= splits["test"]["bytes"] < 570_000
    assert 250_000 <= splits["valid"]["bytes"] < 320_000
    assert "the revolution that began in 1776" in (prepared.folder / "test.txt").read_text().lower()
    before = os.times()
    subprocess.run([sys.executable, str(ROOT / "prepare_data.py"), "-d", str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    after = os.times()  # of processor time: what others do on the machine says nothing
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5  # about half a second


def test_wikitext(reporter: LineReporter, tmp_path: Path, shared_dir: Path) -> None:
    path = shared_dir / "data" / "text" / "wikitext2_raw_test.txt"
    tokenizer = shared_dir / "data" / "tokenizers" / "20B_tokenizer.json"
    if not (path.is_file() and tokenizer.is_file()):
        pytest.skip(f"no {path} or no {tokenizer}")
    prepared = prepare(PrepareOptions(inputs=(str(path),), directory=str(tmp_path), tokenizer_file=str(tokenizer)), reporter)
    splits = prepared.manifest["splits"]
    assert sum(total["bytes"] for total in splits.values()) == path.stat().st_size
    assert 3.5 < splits["train"]["bytes"] / splits["train"]["tokens"] < 5
