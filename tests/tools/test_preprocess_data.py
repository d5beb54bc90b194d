"""tools/datasets/preprocess_data.py and preprocess_data_with_mask.py as people call them: main(arguments), and the command itself."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.preprocessing.bpe import train_bpe
from megatron.data.staging import staging_folder
from megatron.data.tokenizer import TokenizerError
from tools.datasets import preprocess_data, preprocess_data_with_mask

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Fellow-citizens of the Senate,", "  the state of the union — is\n\n strong 😀", "x", "Question: who? Answer: the people"]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "tokenizer.json"
    train_bpe(["the state of the union is the state of the people " * 4, "Question: Answer: senate citizens"], 320, path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": f"title {number}", "meta": {}}) + "\n" for number, text in enumerate(TEXTS)))
    return path


def arguments(corpus: Path | str, vocab: Path, prefix: Path, *more: str) -> list[str]:
    return ["--input", str(corpus), "--tokenizer-type", "HFTokenizer", "--vocab", str(vocab), "--output-prefix", str(prefix), *more]


def pair_bytes(documents: list[list[int]], code: int, letter: str) -> tuple[bytes, bytes]:
    """(.bin, .idx) as GPT-NeoX lays them out, written here from the description of the format."""
    size = struct.calcsize(f"<{letter}")
    lengths = [len(document) for document in documents]
    offsets = [0, *accumulate(length * size for length in lengths[:-1])] if lengths else []
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q", *offsets)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    return b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents), index


def written(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_what_neox_writes_byte_for_byte(corpus: Path, vocab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NeoX's abbreviated --vocab, its file names, and the end-of-document token behind every document."""
    preprocess_data.main(arguments(corpus, vocab, tmp_path / "out" / "mine", "--append-eod"))
    library = Tokenizer.from_file(str(vocab))
    expected = [[*library.encode(text).ids, 0] for text in TEXTS]
    assert written(tmp_path / "out" / "mine_text_document") == pair_bytes(expected, 8, "H")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine_text_document.bin", "mine_text_document.idx"]
    tokens = sum(map(len, expected))
    assert capsys.readouterr().out == f"{tmp_path}/out/mine_text_document.bin and .idx\n4 documents, {tokens} tokens\n"


def test_each_key_has_its_own_text(corpus: Path, vocab: Path, tmp_path: Path) -> None:
    preprocess_data.main(arguments(corpus, vocab, tmp_path / "mine", "--jsonl-keys", "text", "title"))
    library = Tokenizer.from_file(str(vocab))
    assert written(tmp_path / "mine_text_document") == pair_bytes([library.encode(text).ids for text in TEXTS], 8, "H")
    titles = [library.encode(f"title {number}").ids for number in range(len(TEXTS))]
    assert written(tmp_path / "mine_title_document") == pair_bytes(titles, 8, "H")


def test_several_files_and_workers_give_the_same_bytes(vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.preprocessing.encode.BATCH_BYTES", 2000)
    lines = [json.dumps({"text": f"{TEXTS[number % 4]} {number}"}) + "\n" for number in range(600)]
    (tmp_path / "whole.jsonl").write_text("".join(lines))
    (tmp_path / "a.jsonl").write_text("".join(lines[:250]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[250:]).encode()))
    preprocess_data.main(arguments(tmp_path / "whole.jsonl", vocab, tmp_path / "one", "--append-eod"))
    both = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl.gz'}"
    preprocess_data.main(arguments(both, vocab, tmp_path / "two", "--append-eod", "--workers", "2", "--num-docs", "600", "--log-interval", "7"))
    assert written(tmp_path / "one_text_document") == written(tmp_path / "two_text_document")
    assert len(IndexedDataset(tmp_path / "two_text_document")) == 600


@pytest.mark.parametrize(
    ("kind", "files", "vocabulary"),
    [
        ("HFTokenizer", ("20B_tokenizer.json",), 50277),
        ("SPMTokenizer", ("llama2_tokenizer.model",), 32000),
        ("TiktokenTokenizer", ("llama3_tokenizer.model",), 128256),
        ("CharLevelTokenizer", (), 512),
    ],
)
def test_every_type_writes_what_it_encodes(
    kind: str, files: tuple[str, ...], vocabulary: int, shared_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    """As GPT-NeoX's own test of this command, but it looks at what was written."""
    from megatron.data.tokenizer import load_tokenizer

    if kind == "TiktokenTokenizer":
        pytest.importorskip("tiktoken")
    paths = [str(shared_dir / "data" / "tokenizers" / name) for name in files]
    given = [word for flag, path in zip(("--vocab-file", "--merge-file"), paths, strict=False) for word in (flag, path)]
    preprocess_data.main(["--input", str(corpus), "--tokenizer-type", kind, *given, "--append-eod", "--output-prefix", str(tmp_path / "out")])
    tokenizer = load_tokenizer(kind, *(paths or [None]))
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert tokenizer.vocab_size == vocabulary
    assert dataset.dtype == np.dtype("<u2" if vocabulary < 65500 else "<i4")
    assert [dataset.get(number).tolist()[-1] for number in range(len(TEXTS))] == [tokenizer.eod] * len(TEXTS)
    assert [tokenizer.decode(dataset.get(number).tolist()) for number in range(len(TEXTS))] == TEXTS


def test_labels_behind_a_pattern_of_tokens(corpus: Path, vocab: Path, tmp_path: Path) -> None:
    library = Tokenizer.from_file(str(vocab))
    pattern = library.encode(" Answer:").ids
    prefix = tmp_path / "qa"
    preprocess_data_with_mask.main(arguments(corpus, vocab, prefix, "--append-eod", "--mask-before-token", ",".join(map(str, pattern))))
    texts = [[*library.encode(text).ids, 0] for text in TEXTS]
    assert written(tmp_path / "qa_text_document") == pair_bytes(texts, 4, "i")
    start = texts[3].index(pattern[0]) + len(pattern)
    labels = [*texts[:3], [-100] * start + texts[3][start:]]
    assert library.decode(texts[3][start:-1]) == " the people"
    assert written(tmp_path / "qa_label_document") == pair_bytes(labels, 4, "i")


def test_masks_that_cannot_be_had(corpus: Path, vocab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(corpus, vocab, tmp_path / "qa")
    for more, message in (
        ((), "--mask-before-token is missing: give the tokens at the end of the masked part. To prepare text without masks, use preprocess_data.py"),
        (("--mask-before-token", "1,two"), "argument --mask-before-token: '1,two': give token ids separated by commas, such as 0,1,1270"),
        (("--mask-before-token", ","), "argument --mask-before-token: ',': give token ids"),
    ):
        with pytest.raises(SystemExit):
            preprocess_data_with_mask.main([*given, *more])
        assert message in capsys.readouterr().err
    with pytest.raises(TokenizerError, match=r"--mask-before-token: 99999 is not an id of this tokenizer; its ids are 0\.\.\d+"):
        preprocess_data_with_mask.main([*given, "--mask-before-token", "1,99999"])
    for keys in (("text", "title"), ("label",)):
        with pytest.raises(DatasetError, match=f"--jsonl-keys {' '.join(keys)}: masking needs exactly one key. The key must not be 'label'"):
            preprocess_data_with_mask.main([*given, "--mask-before-token", "1", "--jsonl-keys", *keys])


def test_wrong_arguments_are_explained(corpus: Path, vocab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(corpus, vocab, tmp_path / "out")
    for more, message in (
        (("--workers", "0"), "--workers 0: give 1 or more"),
        (("--log-interval", "0"), "--log-interval 0: give 1 or more"),
        (("--num-docs", "-1"), "--num-docs -1: give 1 or more"),
        (("--jsonl-keys", "text", "text"), "--jsonl-keys text text: the same key is given twice"),
        (("--jsonl-keys", "a/b"), "a key is part of a file's name, so it cannot have a slash in it"),
        (("--output-prefix", "out/"), "--output-prefix 'out/': give the start of a file name, such as data/mine"),
        (("--input", "none.jsonl"), "no file or folder none.jsonl; give files"),
        (
            ("--jsonl-keys", "body"),
            r"corpus.jsonl:1: no key 'body'; the keys with text are: text, title \(choose one with --jsonl-key\). Nothing was written",
        ),
    ):
        with pytest.raises(DatasetError, match=message):
            preprocess_data.main([*given, *more])
    for flag, value, message in (
        ("--dataset-impl", "cached", "argument --dataset-impl: 'cached': only mmap is written, the .bin/.idx pair that training reads"),
        ("--tokenizer-type", "Bert", "argument --tokenizer-type: invalid choice: 'Bert'"),
        ("--on-error", "stop", "argument --on-error: invalid choice: 'stop'"),
    ):
        with pytest.raises(SystemExit):
            preprocess_data.main([*given, flag, value])
        assert message in capsys.readouterr().err
    preprocess_data.main([*given, "--dataset-impl", "mmap"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out_text_document.bin", "out_text_document.idx"]


def test_a_tokenizer_without_an_end_of_document(corpus: Path, vocab: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text(vocab.read_text().replace("<|endoftext|>", "<start>"))
    with pytest.raises(TokenizerError, match="--append-eod needs a token that ends a document, and this tokenizer has none"):
        preprocess_data.main(arguments(corpus, tmp_path / "none.json", tmp_path / "out", "--append-eod"))
    preprocess_data.main(arguments(corpus, tmp_path / "none.json", tmp_path / "out"))


def test_bad_input_stops_or_is_left_out(vocab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\noops\n{"other": 1}\n{"text": ""}\n\xff\n{"text": "fine too"}\n')
    with pytest.raises(DatasetError, match=r"bad\.jsonl:2: not JSON .*\. Nothing was written. Correct the input, or .* --on-error skip"):
        preprocess_data.main(arguments(path, vocab, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    preprocess_data.main(arguments(path, vocab, tmp_path / "out", "--on-error", "skip"))
    out = capsys.readouterr().out
    assert "2 documents, " in out
    assert "left out: 4 (" in out
    assert "bad.jsonl:3: no key 'text'" in out
    path.write_text('{"text": " "}\n')
    with pytest.raises(DatasetError, match=r"no text in the input\nleft out: 1 \(document without text 1\)"):
        preprocess_data.main(arguments(path, vocab, tmp_path / "none"))
    assert not list(tmp_path.glob("none*"))


def test_another_run_on_the_same_files_is_refused(corpus: Path, vocab: Path, tmp_path: Path) -> None:
    """Record locks are a process's own, so the other run is another process."""
    code = "import time\nfrom pathlib import Path\nfrom megatron.data.staging import staging_folder\n"
    code += f"with staging_folder(Path({str(tmp_path / 'out')!r})):\n    print('held', flush=True)\n    time.sleep(60)\n"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DatasetError, match=r"another process is preparing .*out right now; wait for it or choose another name"):
            preprocess_data.main(arguments(corpus, vocab, tmp_path / "out"))
    finally:
        holder.kill()
        holder.wait()
    preprocess_data.main(arguments(corpus, vocab, tmp_path / "out"))
    with staging_folder(tmp_path / "out"):
        pass


def run_command(*given: str, script: str = "preprocess_data.py") -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "datasets" / script), *given]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_says_what_is_wrong_in_a_sentence(corpus: Path, vocab: Path, tmp_path: Path) -> None:
    """From a folder and with an environment that know nothing of the package."""
    out, err = run_command(*arguments(corpus, vocab, tmp_path / "out", "--workers", "2")).communicate()
    assert out.endswith(" tokens\n")
    assert "tokenising: 0.0 MB, " in err
    process = run_command(*arguments(corpus, tmp_path / "none.json", tmp_path / "out"))
    out, err = process.communicate()
    assert (process.returncode, err) == (
        1,
        f"vocab_file: no file {tmp_path}/none.json; give the path of a tokenizer.json (`python prepare_data.py` makes one)\n",
    )
    process = run_command(*arguments(corpus, vocab, corpus / "out"))
    assert process.communicate()[1] == f"{corpus}/.out.partial: Not a directory.\n"


def run_until_it_writes(vocab: Path, folder: Path) -> subprocess.Popen[str]:
    """The command on a large file, two workers, in the middle of its work."""
    big = folder / "big.jsonl"
    big.write_text("".join(json.dumps({"text": f"{TEXTS[number % 4]} {number} " * 8}) + "\n" for number in range(40_000)))
    process = run_command(*arguments(big, vocab, folder / "out", "--workers", "2"))
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in (folder / ".out.partial").glob("*.bin*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(vocab: Path, tmp_path: Path) -> None:
    process = run_until_it_writes(vocab, tmp_path)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    err = process.communicate()[1]
    assert process.returncode == 1
    assert err.startswith("a worker process was ended by SIGKILL (the system does that when memory runs out); nothing was written.")
    assert [path.name for path in tmp_path.iterdir()] == ["big.jsonl"]
    assert not any(child.is_running() for child in workers)


def test_killed_it_leaves_the_files_of_before(vocab: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text('{"text": "the old text"}\n')
    preprocess_data.main(arguments(old, vocab, tmp_path / "out"))
    before = written(tmp_path / "out_text_document")
    process = run_until_it_writes(vocab, tmp_path)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130
    assert err.endswith("\nInterrupted.\n")
    assert "Traceback" not in err
    assert not (tmp_path / ".out.partial").exists()
    process = run_until_it_writes(vocab, tmp_path)
    process.kill()
    process.communicate()
    assert written(tmp_path / "out_text_document") == before
    preprocess_data.main(arguments(old, vocab, tmp_path / "out"))
    assert written(tmp_path / "out_text_document") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.jsonl", "old.jsonl", "out_text_document.bin", "out_text_document.idx"]
