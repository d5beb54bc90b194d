"""prepare_data.py as GPT-NeoX's users call it, and its corpora from the network, whose place a local server and local repositories take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from megatron.data.corpus import corpora
from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.preprocessing.bpe import train_bpe
from megatron.data.preprocessing.prepare import PrepareOptions, prepare
from megatron.data.preprocessing.prepare_arguments import parse
from megatron.data.preprocessing.prepared import describe
from megatron.data.progress import LineReporter
from megatron.data.tokenizer import load_tokenizer

PAGE = "  <page>\n    <title>Article {0}</title>\n    <text>Text of article {0}: ünïcode.</text>\n  </page>\n"
DUMP = "<mediawiki>\n" + "".join(PAGE.format(number) for number in range(300)) + "  <page>\n    <title>cut"
TEXTS = [f"Document {number} tells how {number * number} people form a more perfect union." for number in range(150)]


@pytest.fixture
def reporter() -> LineReporter:
    return LineReporter(Console(file=StringIO(), width=200))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([*TEXTS, DUMP], 400, path)
    return path


@pytest.fixture
def options(tmp_path: Path, tokenizer_file: Path) -> Callable[..., PrepareOptions]:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def make(**changes: Any) -> PrepareOptions:
        values: dict[str, Any] = {"inputs": (str(tmp_path / "corpus.jsonl"),), "tokenizer_file": str(tokenizer_file)}
        return PrepareOptions(directory=str(tmp_path / "data"), **{**values, **changes})

    return make


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def enwik8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server that has enwik8.zip."""
    folder = tmp_path / "server"
    folder.mkdir()
    with zipfile.ZipFile(folder / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", DUMP)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        monkeypatch.setattr(corpora, "ENWIK8_URL", f"http://127.0.0.1:{server.server_port}/enwik8.zip")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def texts_of(prefix: Path, tokenizer_file: Path) -> list[str]:
    tokenizer, dataset = load_tokenizer("HFTokenizer", tokenizer_file), IndexedDataset(prefix)
    return [tokenizer.decode(dataset.get(number).tolist()[:-1]) for number in range(len(dataset))]


def test_enwik8_is_downloaded_once_and_lies_where_neox_s_users_look(
    options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path, enwik8: Path, tokenizer_file: Path
) -> None:
    wanted = options(inputs=("enwik8",))
    prepared = prepare(wanted, reporter)
    prefix = tmp_path / "data" / "enwik8" / "enwik8_text_document"
    texts = texts_of(prefix, tokenizer_file)
    assert "".join(texts) == DUMP
    assert len(texts) == 301
    assert all(text.endswith("</page>\n") for text in texts[:-1])
    assert f'data_path: "{prefix}"' in describe(prepared)
    (enwik8 / "enwik8.zip").unlink()
    assert prepare(wanted, reporter).up_to_date
    assert not prepare(options(inputs=("enwik8",), force=True), reporter).up_to_date, "prepared again from what was fetched"
    with pytest.raises(DatasetError, match=r"enwik8\.zip could not be downloaded \(File not found\)\. Check the network\."):
        prepare(options(inputs=("enwik8",), force_redownload=True), reporter)
    assert "".join(texts_of(prefix, tokenizer_file)) == DUMP, "what was there stays"


def test_limits_take_the_first_documents(options: Callable[..., PrepareOptions], reporter: LineReporter, tokenizer_file: Path) -> None:
    held_out = {"valid_fraction": 0.0, "test_fraction": 0.0}
    tokenizer = load_tokenizer("HFTokenizer", tokenizer_file)
    sizes = [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    ten = {"max_documents": 10, "max_bytes": sum(len(text) for text in TEXTS[:10]), "max_tokens": sum(sizes[:11]) - 1}
    for name, limit in ten.items():
        prepared = prepare(options(name=name, **held_out, **{name: limit}), reporter)
        assert texts_of(prepared.folder / f"{name}_text_document", tokenizer_file) == TEXTS[:10]
        assert prepared.manifest["splits"]["train"]["tokens"] == sum(sizes[:10])
    with pytest.raises(DatasetError, match=r"was prepared differently \(limits was \{'documents': 10\}, now \{'documents': 11\}\)"):
        prepare(options(name="max_documents", **held_out, max_documents=11), reporter)
    split = prepare(options(name="split", max_documents=120), reporter)
    assert sum(total["documents"] for total in split.manifest["splits"].values()) == 120
    assert set(split.manifest["splits"]) == {"train", "valid", "test"}
    with pytest.raises(DatasetError, match=r"--max-tokens counts tokens .* needs a tokenizer that exists already"):
        prepare(options(name="none", tokenizer_file=None, max_tokens=100), reporter)


def test_what_was_left_out_stays_in_the_manifest(options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path) -> None:
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('oops\n{"text": ""}\n')
    prepare(options(on_error="skip"), reporter)
    assert json.loads((tmp_path / "data" / "corpus" / "prepared.json").read_text())["left_out"] == {"broken JSON": 1, "document without text": 1}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "pile",
            r"'pile': The Pile and its parts were withdrawn by their host in 2023, so it cannot be downloaded\. Use slimpajama or fineweb-edu; or",
        ),
        ("books3", r"'books3': The Pile .* Use slimpajama, which has such text in it; or prepare a copy that you have: .* FOLDER --name books3"),
        ("enron", r"'enron': The Pile .* Use fineweb-edu or slimpajama; or"),
        ("c4_openwebtext", r"'c4_openwebtext': The mixture of C4 and OpenWebText was withdrawn by its host, .* Use c4 and fineweb, blended"),
    ],
)
def test_neox_s_data_sets_that_are_gone_are_explained(
    options: Callable[..., PrepareOptions], reporter: LineReporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    with pytest.raises(DatasetError, match=sentence):
        prepare(options(inputs=(name,)), reporter)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "copy.txt").write_text("\n".join(TEXTS))
    assert prepare(options(inputs=(name,)), reporter).folder.name == name


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("hub")
    repository = folder / "HuggingFaceFW" / "fineweb"
    (repository / "sample" / "10BT").mkdir(parents=True)
    rows = [{"text": text, "id": "i", "token_count": 3} for text in TEXTS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), repository / "sample" / "10BT" / "000_00000.parquet", row_group_size=40)
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    return folder


def run(folder: Path, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "DATA_DIR": str(folder / "data")}
    command = [sys.executable, str(repository / "prepare_data.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_command_of_neox_s_users(fineweb: Path, tmp_path: Path, tokenizer_file: Path, repository: Path) -> None:
    (tmp_path / "HuggingFaceFW").symlink_to(fineweb / "HuggingFaceFW")
    done = run(tmp_path, repository, "-t", "HFTokenizer", "-v", str(tokenizer_file), "--max-documents", "0.1k", "fineweb")
    assert done.returncode == 0, done.stderr
    prefix = tmp_path / "data" / "fineweb" / "fineweb_text_document"
    assert texts_of(prefix, tokenizer_file) == TEXTS[:100]
    assert f'data_path: "{prefix}"' in done.stdout
    assert "Exception ignored" not in done.stderr
    assert "reading: 0.0 MB" in done.stderr


def test_a_refetch_without_a_network_leaves_what_was_there(
    options: Callable[..., PrepareOptions], reporter: LineReporter, fineweb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(fineweb)
    prepared = prepare(options(inputs=("fineweb",), max_bytes=2000), reporter)
    before = {path.name: path.read_bytes() for path in prepared.folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"HuggingFaceFW/fineweb: the Hugging Face hub cannot be reached \("):
        prepare(options(inputs=("fineweb",), max_bytes=2000, force_redownload=True), reporter)
    assert {path.name: path.read_bytes() for path in prepared.folder.iterdir()} == before
    assert not prepare(options(inputs=("fineweb",), max_bytes=2000, force=True), reporter).up_to_date, "from what was fetched before"


def test_neox_s_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DATA_DIR", "/nowhere/data")
    wanted = PrepareOptions(
        inputs=("enwik8",), directory="x", tokenizer_type="GPT2BPETokenizer", tokenizer_file="v.json", merge_file="m.txt", force_redownload=True
    )
    assert parse(["-t", "GPT2BPETokenizer", "-d", "x", "-v", "v.json", "-m", "m.txt", "-f", "enwik8"]) == wanted
    long = ["--tokenizer", "GPT2BPETokenizer", "--data-dir", "x", "--vocab-file", "v.json", "--merge-file", "m.txt", "--force-redownload", "enwik8"]
    assert parse(long) == wanted
    assert parse([]).directory == "/nowhere/data"
    assert parse(["c4", "--max-tokens", "1B", "--subset", "realnewslike"]).limits.numbers() == {"tokens": 10**9}
    with pytest.raises(SystemExit):
        parse(["c4", "--max-tokens", "many"])
    assert "argument --max-tokens/--tokens: 'many' is not an amount; give a number above 0" in capsys.readouterr().err
