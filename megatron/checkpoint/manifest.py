"""What a whole checkpoint consists of: size and SHA-256 of every file, written last and checked before loading."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.config.disk import reason

FORMAT = 1
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint by their path inside it, and facts about how it was written."""

    files: dict[str, FileRecord]
    facts: dict[str, Any]


class HashingWriter:
    """A file that is being written and hashed at once; `close` flushes it to the disk and returns its record.

    The first OSError is kept in `error`: PyTorch's writer, which calls `write` from C++, reports others after it.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 -- closed by `close`
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Appends bytes (any object with a buffer)."""
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._hash.update(data)
        self._size += written
        return written

    def flush(self) -> None:
        """Does nothing: `close` flushes once, down to the disk."""

    def close(self) -> FileRecord:
        """Writes everything to the disk; raises the OSError of the system when it is full."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        return FileRecord(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Closes the file without caring for its content."""
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or error


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Writes one small file down to the disk."""
    writer = HashingWriter(path)
    try:
        writer.write(content)
    except OSError:
        writer.abandon()
        raise
    return writer.close()


def sync_directory(path: Path) -> None:
    """Makes the names inside a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(path: Path, files: Mapping[str, FileRecord], facts: Mapping[str, Any]) -> None:
    """Writes the manifest of the checkpoint in `path`; everything it lists is on the disk already."""
    content = {"format": FORMAT, **facts, "files": {name: asdict(files[name]) for name in sorted(files)}}
    write_bytes(path / layout.MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a checkpoint; None when there is none (another program's checkpoint). Raises CheckpointError when unreadable."""
    file = path / layout.MANIFEST
    try:
        content = json.loads(file.read_text())
        files = {name: FileRecord(int(record["size"]), str(record["sha256"])) for name, record in content.pop("files").items()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}: {error}): it must list the files of this checkpoint. Load another checkpoint."
        ) from error
    return Manifest(files, content)


def damage(path: Path) -> list[str]:
    """Sentences on what is wrong with a checkpoint's files, empty when nothing is; without a manifest nothing can be checked."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    if manifest is None:
        return []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        problems = pool.map(lambda item: _file_damage(path / item[0], item[1]), manifest.files.items())
        return [problem for problem in problems if problem is not None]


def _file_damage(file: Path, expected: FileRecord) -> str | None:
    try:
        size = file.stat().st_size
        if size != expected.size:
            return f"{file} is damaged: expected {expected.size:,} bytes, found {size:,}."
        found = _sha256(file)
    except FileNotFoundError:
        return f"{file} is missing: expected {expected.size:,} bytes."
    except OSError as error:
        return f"{file} cannot be read: {reason(error)}."
    if found != expected.sha256:
        return f"{file} is damaged: expected SHA-256 {expected.sha256}, found {found}."
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
