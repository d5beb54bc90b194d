"""Domains without files, domains of files, and what is said about those that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron.analysis.routing.texts import BUILT_IN, TextError, domains_of


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_texts_need_no_file_and_are_the_same_every_time(name: str) -> None:
    (domain,) = domains_of([name])
    tokens = domain.tokens(characters, most=5000, end=0)
    assert len(tokens) == 5000
    assert tokens.tolist() == domain.tokens(characters, most=5000, end=0).tolist()
    text = "".join(map(chr, tokens))
    assert {"sotu": "the", "stdlib": "import", "math": "Question: "}[name] in text


def test_mathematics_is_right() -> None:
    (domain,) = domains_of(["math"])
    text = "".join(map(chr, domain.tokens(characters, most=60_000, end=None)))
    sums = re.findall(r"What is (\d+) ([-+*]) (\d+)\? Answer: (-?\d+)\n", text)
    assert len(sums) > 100
    for a, sign, b, answer in sums:
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(answer)
    equations = re.findall(r"Solve (\d+)\*(\w) \+ (\d+) = (-?\d+) for \w\. Answer: \w = (-?\d+)\n", text)
    assert len(equations) > 50
    assert all(int(factor) * int(x) + int(constant) == int(value) for factor, _, constant, value, x in equations)


def test_without_a_text_all_built_in_ones_are_read() -> None:
    assert [domain.name for domain in domains_of([])] == ["sotu", "stdlib", "math"]


def test_documents_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cd")))
    (tmp_path / "b.txt").write_text("efgh")
    (tmp_path / "empty.txt").write_text("")
    domains = domains_of([f"lines={tmp_path / 'a.jsonl'}", str(tmp_path / "b.txt"), f"none={tmp_path / 'empty.txt'}"])
    assert [domain.name for domain in domains] == ["lines", "b", "none"]
    assert domains[0].tokens(characters, most=100, end=0).tolist() == [97, 98, 0, 99, 100, 0]
    assert domains[1].tokens(characters, most=3, end=None).tolist() == [101, 102, 103]
    with pytest.raises(TextError, match="The text of domain 'none' has no tokens"):
        domains[2].tokens(characters, most=3, end=0)


def test_a_long_document_is_not_tokenized_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("line\n" * 100_000)
    seen = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return characters(text)

    (domain,) = domains_of([str(tmp_path / "long.txt")])
    assert len(domain.tokens(encode, most=100, end=None)) == 100
    assert sum(seen) <= 3200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["=x"], r"--text =x: write DOMAIN=FILE, with a name other than 'all', or one of sotu, stdlib, math"),
        (["all=x"], "with a name other than 'all'"),
        (["prose=missing.txt"], r"there is no file missing\.txt\. Give a file or folder, or one of sotu, stdlib, math"),
        (["math", "math"], "the domain 'math' is given twice"),
    ],
)
def test_what_is_no_text(given: list[str], message: str) -> None:
    with pytest.raises(TextError, match=message):
        domains_of(given)


def test_what_is_wrong_with_files_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(7):
        (tmp_path / f"bad{number}.jsonl").write_text('{"text": "good"}\n{broken\n')
    (domain,) = domains_of([str(tmp_path)])
    assert "".join(map(chr, domain.tokens(characters, most=100, end=None))) == "good" * 7
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 5
    assert "bad0.jsonl:2: not JSON" in told[0]
    assert told[-1].endswith("Further problems are not shown.")
