"""Corpora that the real packages of other projects have written come out as our own preprocessing writes them, byte for byte.

`fixtures/` holds what `make_fixtures.sh` wrote with the versions in foreign_packages.txt. The slow test installs these packages, writes a larger
corpus, and lets them read what we export.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from megatron.data.formats.importing import ImportOptions, import_tokens
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocessing.encode import IGNORED, TextTask
from megatron.data.preprocessing.preprocess import PreprocessOptions, preprocess, text_job
from megatron.data.progress import build_reporter
from megatron.data.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
QUIET = build_reporter(quiet=True)
SAME = {
    "datatrove/plain": ("datatrove", {}),
    "datatrove/bare": ("datatrove", {"borders": "eod"}),
    "olmo_core": ("olmo", {}),
    "streaming/typed": ("mds", {}),
    "streaming/untyped": ("mds", {}),
    "streaming/bytes": ("mds", {"dtype": np.dtype("<i8")}),
    "litdata/tensors": ("litdata", {}),
    "litdata/arrays": ("litdata", {}),
    "litdata/dictionaries": ("litdata", {"column": "tokens"}),
    "megatron_core/plain": ("megatron", {}),
    "megatron_core/modes": ("megatron", {}),
}
"""Folder or pair -> the format and the options with which it is our own pair."""


def tokenizer_of(path: Path) -> Tokenizer:
    return load_tokenizer("HFTokenizer", path)


def ours(texts: Path, tokenizer: Path, folder: Path) -> Path:
    task = TextTask("HFTokenizer", str(tokenizer), append_eod=True)
    given = PreprocessOptions(inputs=(str(texts),), keys=("text",), output_prefix=str(folder / "ours"))
    return preprocess(text_job(task, ("text",)), given, QUIET).prefixes[0]


def imported(corpus: Path, kind: str, tokenizer: Path, folder: Path, **options: object) -> Path:
    library = tokenizer_of(tokenizer)
    prefix = folder / "imported"
    given = {"format": kind, "inputs": (str(corpus),), "output_prefix": str(prefix), "vocab_size": library.vocab_size, "eod": library.eod}
    import_tokens(ImportOptions(**{**given, **options}), QUIET)  # type: ignore[arg-type]
    return prefix


def files_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ours(FIXTURES / "texts.jsonl", FIXTURES / "tokenizer.json", tmp_path_factory.mktemp("ours"))


@pytest.mark.parametrize("corpus", SAME)
def test_a_real_package_s_corpus_is_our_own_pair(corpus: str, reference: Path, tmp_path: Path) -> None:
    if corpus in ("streaming/typed", "litdata/arrays"):
        pytest.importorskip("zstandard", reason="the package zstandard is not installed")
    kind, options = SAME[corpus]
    prefix = imported(FIXTURES / corpus, kind, FIXTURES / "tokenizer.json", tmp_path, **options)  # type: ignore[arg-type]
    assert files_of(prefix) == files_of(reference)


def test_a_loss_mask_becomes_labels(reference: Path, tmp_path: Path) -> None:
    """datatrove was told that the first five characters are not learned; of a text that ends inside them, it keeps nothing."""
    prefix = imported(FIXTURES / "datatrove" / "loss", "datatrove", FIXTURES / "tokenizer.json", tmp_path)
    tokens, labels, whole = IndexedDataset(prefix), IndexedDataset(f"{prefix}_label"), IndexedDataset(reference)
    assert tokens.dtype == labels.dtype == np.int32
    assert len(tokens.document_ends) == len(whole)
    text = json.loads((FIXTURES / "texts.jsonl").read_text().splitlines()[0])["text"]
    skipped = Library.from_file(str(FIXTURES / "tokenizer.json")).encode(text).char_to_token(5)
    assert skipped == 1
    assert tokens.get(0).tolist() == whole.get(0).tolist()
    assert labels.get(0).tolist() == [IGNORED] * skipped + whole.get(0).tolist()[skipped:]
    empty = next(number for number, line in enumerate((FIXTURES / "texts.jsonl").read_text().splitlines()) if len(json.loads(line)["text"]) < 5)
    assert tokens.document_ends[empty] == tokens.document_ends[empty - 1]


def test_documents_of_several_sequences_stay_so(reference: Path, tmp_path: Path) -> None:
    prefix = imported(FIXTURES / "megatron_core" / "sentences", "megatron", FIXTURES / "tokenizer.json", tmp_path)
    assert files_of(prefix) == files_of(FIXTURES / "megatron_core" / "sentences")
    pair, whole = IndexedDataset(prefix), IndexedDataset(reference)
    assert pair.document_ends.tolist() == [*range(2, 2 * len(whole) + 1, 2), 2 * len(whole)]
    assert pair.tokens.tolist() == whole.tokens.tolist()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(texts, tokenizer): shared ones with a vocabulary of 50,277 if they are there, else the speeches of the default corpus and a trained one."""
    from megatron.data.corpus.corpora import Request, find_corpus
    from megatron.data.preprocessing.bpe import train_bpe

    folder, shared = tmp_path_factory.mktemp("large"), Path(__file__).resolve().parents[4] / "shared" / "data"
    texts = folder / "texts.jsonl"
    if (shared / "tokenizers" / "20B_tokenizer.json").is_file():
        parts = (shared / "text" / "wikitext2_raw_test.txt").read_text(encoding="utf-8").split("\n \n")
        tokenizer = shared / "tokenizers" / "20B_tokenizer.json"
    else:
        parts = [document.text for document in find_corpus(Request()).documents(pytest.fail)][:30]
        tokenizer = folder / "tokenizer.json"
        train_bpe(parts, 8192, tokenizer)
    texts.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts if len(part.strip()) > 20))
    return texts, tokenizer


EXPORTED = {"datatrove": "datatrove", "streaming": "mds", "litdata": "litdata", "olmo_core": "olmo", "megatron_core": None}
"""Package -> the format that it reads. None: it reads our pairs."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("package", EXPORTED)
def test_the_package_of_today_writes_what_we_read_and_reads_what_we_write(package: str, large: tuple[Path, Path], tmp_path: Path) -> None:
    line = next(line for line in (HERE / "foreign_packages.txt").read_text().splitlines() if line.startswith(package))
    target = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), *line.split()[1:]]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {line.split()[1]} here: {done.stderr.strip().splitlines()[-1]}")
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def foreign(*arguments: object) -> None:
        command = [sys.executable, "-W", "ignore", str(HERE / "foreign_packages.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    foreign(package, *large, tmp_path / "corpora")
    (tmp_path / "exported").mkdir()
    prefix = ours(*large, tmp_path / "exported")
    reference = files_of(prefix)
    corpora = {name: given for name, given in SAME.items() if name.split("/")[0] == package}
    assert corpora
    for name, (kind, options) in corpora.items():
        assert files_of(imported(tmp_path / "corpora" / name, kind, large[1], tmp_path, **options)) == reference, name  # type: ignore[arg-type]
    folder = prefix.parent
    if (exported := EXPORTED[package]) is not None:
        folder = tmp_path / "written"
        foreign("--export", exported, prefix, folder)
    foreign("--read", package, folder, tmp_path / "found.json")
    found, pair = json.loads((tmp_path / "found.json").read_text()), IndexedDataset(prefix)
    documents = [pair.get(number).tolist() for number in range(len(pair))]
    assert found == ([[token for row in documents for token in row]] if package == "litdata" else documents)


def test_every_foreign_package_has_a_writer() -> None:
    specification = importlib.util.spec_from_file_location("foreign_packages", HERE / "foreign_packages.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert set(module.PACKAGES) == {line.split()[0] for line in (HERE / "foreign_packages.txt").read_text().splitlines()}
    assert {name.split("/")[0] for name in SAME} == set(module.PACKAGES)
