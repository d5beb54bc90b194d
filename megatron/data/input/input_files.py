"""Which files the user means: paths, folders, patterns and comma lists become one list of files in a fixed order."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.data.indexed import DatasetError
from megatron.data.input.archives import ARCHIVE_SUFFIXES
from megatron.data.input.bad_input import Kind, OnProblem, Problem, ignore
from megatron.data.input.compression import COMPRESSED_SUFFIXES
from megatron.data.input.contents import HEAD_BYTES, compression_of, container_of, json_form

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*JSONL_SUFFIXES, ".json")
SEARCHED_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet", *ARCHIVE_SUFFIXES)
SHORT_SUFFIXES = {".tgz": (".tar", ".gz"), ".tbz2": (".tar", ".bz2"), ".txz": (".tar", ".xz"), ".tzst": (".tar", ".zst"), ".zstd": ("", ".zst")}
SHOWN_FILES = 5
GIVE = "give files (.jsonl, .json, .txt, .parquet, compressed or in .tar or .zip), folders or patterns of them, separated by spaces or commas"


def kind_of(name: str) -> tuple[str, str]:
    """The format and the compression that a file's name says: ('.jsonl', '.gz'). ('', '') for a name that says neither."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in SHORT_SUFFIXES:
        kind, suffix = SHORT_SUFFIXES[suffix]
        return kind or Path(path.stem).suffix.lower(), suffix
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSED_SUFFIXES else (suffix, "")


def find_files(inputs: Sequence[str], on_problem: OnProblem = ignore) -> tuple[Path, ...]:
    """The files of each input in turn. The files of a folder or a pattern come in natural order (part-2 before part-10). `-` is the standard input.

    Files of a folder that are not read are reported to `on_problem` (Kind.PASSED_OVER). Raises DatasetError.
    """
    return tuple(file for text in inputs for file in files_of(text, on_problem))


def files_of(text: str, on_problem: OnProblem) -> Iterator[Path]:
    path = Path("/dev/stdin") if text == "-" else Path(text).expanduser()
    if path.is_file() or path.is_fifo():
        yield path
    elif path.is_dir():
        yield from files_below(path, on_problem)
    elif "," in text:
        yield from find_files([part.strip() for part in text.split(",") if part.strip()], on_problem)
    elif glob.has_magic(text):
        found = sorted(glob.glob(str(path), recursive=True), key=natural_order)
        if not found:
            raise DatasetError(f"no file matches {text}; {GIVE}")
        yield from find_files(found, on_problem)
    else:
        raise DatasetError(f"no file or folder {text}; {GIVE}")


def files_below(folder: Path, on_problem: OnProblem) -> list[Path]:
    """The files of a folder whose suffix or first bytes say that they hold text, without hidden ones. A file that the user names may have any
    name."""
    found = [path for path in folder.rglob("*") if path.is_file() and not is_hidden(path.relative_to(folder))]
    files = [path for path in found if kind_of(path.name)[0] in SEARCHED_SUFFIXES or begins_as_corpus(path)]
    taken = set(files)
    others = sorted((path for path in found if path not in taken and path.stat().st_size), key=lambda path: natural_order(str(path)))
    names = ", ".join(str(path.relative_to(folder)) for path in others[:SHOWN_FILES]) + (", ..." if len(others) > SHOWN_FILES else "")
    if not files:
        there = f"; it has {names}, which you can give by name or by a pattern" if others else ""
        raise DatasetError(
            f"{folder}: no {', '.join(SEARCHED_SUFFIXES)} files in this folder (compressed ones, {', '.join(COMPRESSED_SUFFIXES)}, would "
            f"count too){there}"
        )
    if others:
        what = (
            f"{len(others):,} file(s) in it are not read, because neither the name nor the first bytes say that they hold text: {names}. "
            "To read one, give its path"
        )
        on_problem(Problem(Kind.PASSED_OVER, str(folder), what))
    return sorted(files, key=lambda path: natural_order(str(path)))


def begins_as_corpus(path: Path) -> bool:
    """Whether a file begins like JSON or parquet, or like a compressed file or an archive, although its name does not say so. A compressed file or an
    archive does not count if its name says another kind."""
    if path.name.startswith("_"):
        return False  # `_SUCCESS`, `_metadata`: what writers of many parts leave beside them
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False  # what may not be read is passed over, which is said
    packed = compression_of(head) or container_of(head)
    return packed == ".parquet" or (bool(packed) and not path.suffix) or json_form(head, whole=len(head) < HEAD_BYTES) is not None


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """A sort key: digits count as the number they spell."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]
