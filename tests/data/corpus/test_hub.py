"""Corpora on the hub, read by the real package `datasets` from repositories of the same layout and record shapes in a local folder.

`datasets` takes a folder OWNER/NAME of the working directory for the repository of that name, so nothing is replaced but the network.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from megatron.data.corpus import store as store_module
from megatron.data.corpus.corpora import FetchedCorpus, Request, find_corpus
from megatron.data.corpus.hub import HUB_CORPORA, HubStream, hub_corpus
from megatron.data.corpus.limits import Limits
from megatron.data.indexed import DatasetError

TEXTS = [f"document {number}, ünïcode" for number in range(900)]
FINEWEB = {"id": "<urn:1>", "dump": "CC", "url": "u", "date": "d", "file_path": "s3", "language": "en", "language_score": 0.9, "token_count": 3}
CONFIGURATION = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {1}\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 300 rows for each corpus."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    folder = tmp_path_factory.mktemp("hub")
    for name in ("fineweb", "fineweb-edu"):
        repository = folder / "HuggingFaceFW" / name
        write(repository, "sample/10BT/{0:03d}_00000.parquet", lambda text: {"text": text, **FINEWEB})
        write(repository, "data/CC-MAIN-2024-10/{0:03d}.parquet", lambda text: {"text": f"crawl {text}", **FINEWEB})
        readme(repository, ("default", "data/*/*"), ("sample-10BT", "sample/10BT/*"))
    c4 = folder / "allenai" / "c4"
    write(c4, "en/c4-train.{0:05d}-of-01024.json.gz", lambda text: {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"})
    write(c4, "realnewslike/c4-train.{0:05d}-of-00512.json.gz", lambda text: {"text": f"news {text}", "timestamp": "t", "url": "u"})
    readme(c4, ("en", "en/c4-train.*.json.gz"), ("realnewslike", "realnewslike/c4-train.*.json.gz"))
    slim = {"meta": {"redpajama_set_name": "RedPajamaC4"}}
    write(folder / "cerebras" / "SlimPajama-627B", "train/chunk1/example_train_{0}.jsonl.gz", lambda text: {"text": text, **slim})
    together = folder / "togethercomputer"
    write(together / "RedPajama-Data-1T-Sample", "default/train/{0:04d}.parquet", lambda text: {"text": text, "meta": "{}"})
    write(together / "RedPajama-Data-V2", "sample/train/{0:04d}.parquet", lambda text: {"raw_content": text, "doc_id": "i", "quality_signals": "{}"})
    return folder


def readme(repository: Path, *configurations: tuple[str, str]) -> None:
    (repository / "README.md").write_text("---\nconfigs:\n" + "".join(CONFIGURATION.format(*pair) for pair in configurations) + "---\n")


def write(repository: Path, name: str, row: Callable[[str], dict[str, Any]]) -> None:
    for number in range(3):
        path = repository / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row(text) for text in TEXTS[300 * number : 300 * number + 300]]
        if path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
        else:
            path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in rows).encode()))


@pytest.fixture(autouse=True)
def here(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", hub / "cache")  # not the user's


def corpus(directory: Path, name: str, subset: str | None = None, key: str = "text") -> FetchedCorpus:
    found = find_corpus(Request(inputs=(name,), directory=str(directory), subset=subset, jsonl_key=key, limits=Limits(documents="all")))
    assert isinstance(found, FetchedCorpus)
    return found


def texts(corpus: FetchedCorpus, count: int | None = None) -> Sequence[str]:
    with closing(corpus.documents(pytest.fail)) as documents:
        return [document.text for document in itertools.islice(documents, count)]


@pytest.mark.parametrize("name", HUB_CORPORA)
def test_every_corpus_is_read_whole_kept_and_named(tmp_path: Path, name: str) -> None:
    found = corpus(tmp_path, name)
    assert found.name == name
    assert texts(found) == TEXTS
    assert found.store.folder.parent == tmp_path / "fetched"
    assert texts(corpus(tmp_path, name)) == TEXTS


def test_another_subset_is_another_corpus(tmp_path: Path) -> None:
    assert texts(corpus(tmp_path, "c4", "realnewslike"), 1) == ["news document 0, ünïcode"]
    assert texts(corpus(tmp_path, "c4"), 1) == ["document 0, ünïcode"]
    assert sorted(path.name for path in (tmp_path / "fetched").iterdir()) == ["c4-en", "c4-realnewslike"]


def test_any_repository_by_its_name(tmp_path: Path) -> None:
    found = corpus(tmp_path, "hf:togethercomputer/RedPajama-Data-V2", key="raw_content")
    assert found.name == "RedPajama-Data-V2"
    assert texts(found, 2) == TEXTS[:2]
    assert found.store.folder.name == "togethercomputer--RedPajama-Data-V2"


@pytest.mark.parametrize("name", ["fineweb", "c4", "slimpajama"])
def test_an_interrupted_fetch_goes_on_inside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 5_000)  # some 130 documents
    for count in (100, 431, 437, 899):
        assert texts(corpus(tmp_path, name), count) == TEXTS[:count]
    assert texts(corpus(tmp_path, name)) == TEXTS


def test_what_the_hub_does_not_have_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"HuggingFaceFW/fineweb could not be read \(ValueError: BuilderConfig 'sample-11BT' not found\. Available"
    ):
        texts(corpus(tmp_path, "fineweb", "sample-11BT"))
    with pytest.raises(DatasetError, match=r"allenai/c4 could not be read \(ValueError: Config name is missing"):
        texts(corpus(tmp_path, "hf:allenai/c4"))
    with (
        pytest.raises(DatasetError, match=r"no key 'body'; it has text under: text, url"),
        closing(corpus(tmp_path, "hf:allenai/c4", "en", "body").documents(stop)) as documents,
    ):
        next(documents)


def stop(problem: object) -> None:
    raise DatasetError(str(problem))


def test_without_a_network_the_user_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DatasetError, match=r"allenai/c4: the Hugging Face hub cannot be reached \(.*\)\. Is there a network, and HF_HUB_OFFLINE not set\?"
    ):
        texts(corpus(tmp_path, "c4"))


def test_without_the_package_the_user_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(DatasetError, match=r"allenai/c4 is read through the package datasets \(`pip install datasets`, .* Without it, .* NAME$"):
        texts(corpus(tmp_path, "c4"))


def test_how_much_has_to_be_said(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"c4 is 305 GB \(en; .*\); say how much of it to take: --max-documents, --max-bytes or --max-tokens with a number"
    ):
        find_corpus(Request(inputs=("c4",)))
    with pytest.raises(DatasetError, match=r"hf:a/b is of a size that is not known here; say how much of it"):
        find_corpus(Request(inputs=("hf:a/b",)))
    for name in ("hf:", "hf:a/b/c", "hf:../x", "hf:a b"):
        with pytest.raises(DatasetError, match=r"hf:.*: corpora on the Hugging Face hub are called hf:OWNER/NAME, for instance"):
            find_corpus(Request(inputs=(name,), limits=Limits(documents=1)))
    with pytest.raises(DatasetError, match=r"--subset x: only corpora on the Hugging Face hub have subsets \(fineweb, .*, hf:OWNER/NAME\)"):
        find_corpus(Request(inputs=("sotu",), subset="x"))


def test_a_connection_that_breaks_in_the_middle_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = hub_corpus("c4", "text")
    assert spec is not None
    stream = HubStream(spec, "en")

    def broken() -> Any:
        yield {"text": "first"}
        raise ConnectionError("reset by peer\nand more")

    monkeypatch.setattr(stream, "_rows", broken())
    records = stream.records()
    assert next(records).origin == "allenai/c4/en:row 1"
    with pytest.raises(DatasetError, match=r"allenai/c4: the Hugging Face hub cannot be reached \(reset by peer\)"):
        next(records)
