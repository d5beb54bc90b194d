"""What is written down about a part, so that a later run knows whether it is whole and still right.

A part is PREFIX.bin and .idx and PREFIX.json, which is written last. Without a record there is no part.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.data.indexed import DatasetError, sync
from megatron.data.locking import naming

SETTINGS = "settings.json"
FORMAT = 1


class InputFile(NamedTuple):
    """A file of the corpus. `name` is its path below the corpus's folder. `sha256` None: not known. `path` is where it lies, or will after its
    download."""

    name: str
    size: int
    sha256: str | None
    path: Path

    def prefix(self, folder: Path) -> Path:
        """Of the file's part. It depends on the name alone, so a file that joins the corpus changes no other part."""
        return folder / self.name.replace("%", "%25").replace("/", "%2F")


@dataclass(frozen=True)
class Record:
    """`limits`: how much was wanted of the file, if it was left before its end; empty: all of it was read. `settings`: a digest of all that the
    tokens depend on besides the file. `seconds` of one process."""

    settings: str
    name: str
    size: int
    modified: int
    input_sha256: str
    documents: int
    tokens: int
    text_bytes: int
    limits: dict[str, int]
    left_out: dict[str, int]
    notes: list[str]
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    seconds: float

    def serves(self, limits: dict[str, int]) -> bool:
        """Whether the part holds all that a run with these limits takes of the file."""
        return not self.limits or any(getattr(self, name) >= limit for name, limit in limits.items())


def record_path(prefix: Path) -> Path:
    return Path(f"{prefix}.json")


def read_record(prefix: Path) -> Record | None:
    """None: the part is not there, or not whole."""
    try:
        record = Record(**json.loads(record_path(prefix).read_text(encoding="utf-8")))
        sizes = [Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx")]
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if sizes == [record.bin_bytes, record.idx_bytes] else None


def write_record(prefix: Path, record: Record) -> None:
    write_json(record_path(prefix), asdict(record))


def write_json(path: Path, value: Any) -> None:
    """The file has its old content or its new one, whenever the process is killed."""
    temporary = path.with_name(f"{path.name}.partial")
    with naming(path.parent):
        with temporary.open("wb") as file:
            file.write(json.dumps(value, indent=1).encode())
            sync(file)
        os.replace(temporary, path)


def why_not(record: Record, file: InputFile, settings: str) -> str | None:
    """Why the part is not that of this file any more. None: it is. A file with another time and the same content is the same file."""
    if record.settings != settings:
        return "it was made with other settings"
    if record.size != file.size:
        return f"the input file had {record.size:,} bytes and has {file.size:,}"
    if file.sha256 is not None:
        return None if record.input_sha256 == file.sha256 else "the input file has another checksum"
    if file.path.is_file() and record.modified != file.path.stat().st_mtime_ns and digest_of(file.path) != record.input_sha256:
        return "the input file has other content"
    return None


def check_part(prefix: Path, record: Record) -> None:
    """Reads the part and compares its checksums. Raises DatasetError."""
    for suffix, wanted in ((".bin", record.bin_sha256), (".idx", record.idx_sha256)):
        if digest_of(Path(f"{prefix}{suffix}")) != wanted:
            raise DatasetError(
                f"{prefix}{suffix} is damaged: its checksum is not the one that was written down. Remove {record_path(prefix)}; the command then "
                "makes this part again"
            )


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
