"""Which files the user means: paths, folders, patterns and comma lists become one list of files in a fixed order."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.data.indexed import DatasetError
from megatron.data.input.archives import ARCHIVE_SUFFIXES
from megatron.data.input.compression import COMPRESSED_SUFFIXES

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
SEARCHED_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".json", ".parquet", *ARCHIVE_SUFFIXES)
SHORT_SUFFIXES = {".tgz": (".tar", ".gz"), ".tbz2": (".tar", ".bz2"), ".txz": (".tar", ".xz"), ".tzst": (".tar", ".zst"), ".zstd": ("", ".zst")}
GIVE = "give files (.jsonl, .json, .txt, .parquet, compressed or in .tar or .zip), folders or patterns of them, separated by spaces or commas"


def kind_of(name: str) -> tuple[str, str]:
    """What is in a file and how it is compressed, by its name: ('.jsonl', '.gz'); ('', '') for a name that says nothing."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in SHORT_SUFFIXES:
        kind, suffix = SHORT_SUFFIXES[suffix]
        return kind or Path(path.stem).suffix.lower(), suffix
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSED_SUFFIXES else (suffix, "")


def find_files(inputs: Sequence[str]) -> tuple[Path, ...]:
    """The files of each input in turn; of a folder or a pattern in natural order (part-2 before part-10). Raises DatasetError."""
    return tuple(file for text in inputs for file in files_of(text))


def files_of(text: str) -> Iterator[Path]:
    path = Path(text).expanduser()
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from files_below(path)
    elif "," in text:
        yield from find_files([part.strip() for part in text.split(",") if part.strip()])
    elif glob.has_magic(text):
        found = sorted(glob.glob(str(path), recursive=True), key=natural_order)
        if not found:
            raise DatasetError(f"no file matches {text}; {GIVE}")
        yield from find_files(found)
    else:
        raise DatasetError(f"no file or folder {text}; {GIVE}")


def files_below(folder: Path) -> list[Path]:
    """Files whose suffix says that they hold text, hidden ones aside; an explicitly named file may have any."""
    found = [path for path in folder.rglob("*") if path.is_file() and kind_of(path.name)[0] in SEARCHED_SUFFIXES]
    files = sorted((path for path in found if not is_hidden(path.relative_to(folder))), key=lambda path: natural_order(str(path)))
    if not files:
        raise DatasetError(f"{folder}: no {', '.join(SEARCHED_SUFFIXES)} files in this folder ({', '.join(COMPRESSED_SUFFIXES)} of them count)")
    return files


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """A sort key: digits count as the number they spell."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]
