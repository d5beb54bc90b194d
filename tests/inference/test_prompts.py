"""Prompts from a file and from a person."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.inference.errors import InferenceError
from megatron.inference.prompts import choose_source, read_prompts, read_text, split_prompts, typed_prompts
from tests.inference.conftest import lively_config


@pytest.mark.parametrize(
    ("keys", "terminal", "source"),
    [
        ({}, True, "interactive"),
        ({}, False, "unconditional"),
        ({"sample_input_file": "a.txt"}, True, "input-file"),
        ({"sample_input_file": "a.txt", "text_gen_type": "interactive"}, True, "interactive"),
        ({"text_gen_type": "unconditional"}, True, "unconditional"),
    ],
)
def test_where_prompts_come_from(keys: dict[str, Any], terminal: bool, source: str) -> None:
    assert choose_source(lively_config(**keys).inference, terminal=terminal) == source


def test_prompts_are_split_stripped_and_empty_ones_dropped() -> None:
    assert split_prompts("one\n  two \n\n\nthree", "\n") == ["one", "two", "three"]
    assert split_prompts("one\ntwo\n###\n\n###three", "###") == ["one\ntwo", "three"]
    assert split_prompts(" one\ntwo\n", "") == ["one\ntwo"]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Fellow citizens,\n\nÀ bientôt\n", encoding="utf-8")
    assert read_prompts(path, "\n") == ["Fellow citizens,", "À bientôt"]


def test_a_file_without_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    with pytest.raises(InferenceError, match=r"prompts.txt holds no prompt; write each prompt with '\\n' \(prompt_end\) after it"):
        read_prompts(path, "\n")


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match=r"sample_input_file: .*none.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt", "\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InferenceError, match=r"latin is not UTF-8 text \(byte 3 is 0xe9\); convert it first"):
        read_prompts(tmp_path / "latin", "\n")


def typing(*lines: str) -> Callable[[str], str]:
    remaining = iter(lines)

    def read_line(_: str) -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    return read_line


def test_typed_lines_are_prompts() -> None:
    assert list(typed_prompts(typing("one", " two ", ""), "\n")) == ["one", "two", ""]
    assert list(typed_prompts(typing("one"), "")) == ["one"]


def test_typed_prompts_of_several_lines() -> None:
    assert list(typed_prompts(typing("one", "two###", "three", "###", "unended"), "###")) == ["one\ntwo", "three"]
    assert list(typed_prompts(typing("one", "", "two", ""), "\n\n")) == ["one", "two"]


@pytest.mark.parametrize("word", ["/quit", " /quit "])
def test_quit_ends(word: str) -> None:
    assert list(typed_prompts(typing("one", word, "two"), "\n")) == ["one"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii:surrogateescape"])
def test_bytes_that_are_no_text_are_a_sentence(encoding: str, repository: Path) -> None:
    """As a pipe brings them to `input`, in either of the ways that Python reads it."""
    program = "from megatron.inference.prompts import typed_prompts\nfrom megatron.script import exit_status\n"
    program += "raise SystemExit(exit_status(lambda: print(list(typed_prompts(input, '\\n')))))"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", program], input=b"one\nt\xffwo\n", env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"Standard input is not UTF-8 text")
    assert done.stderr.endswith(b"give UTF-8 text, or name a file with -i FILE.\n")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Windows' editors begin files with one; prompts and scored texts pass over it, and keep one elsewhere."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert read_prompts(tmp_path / "prompts.txt", "\n") == ["first", "second"]
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbfb")
    assert read_text(tmp_path / "text.txt", "eval_text_files") == "a\ufeffb"
