"""The files inside .tar and .zip archives, one after the other, without unpacking them to disk."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

from megatron.data.input.bad_input import Kind, OnProblem, Problem
from megatron.data.input.compression import naming_damage

ARCHIVE_SUFFIXES = (".tar", ".zip")


def tar_members(file: IO[bytes], name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, content) of every plain file in the archive, in its order; each is read before the next is asked for. Raises Damaged."""
    place = 0
    with naming_damage(lambda: f"{name}:byte {place}"), tarfile.open(fileobj=file, mode="r|") as archive:
        while (member := archive.next()) is not None:
            content = archive.extractfile(member) if member.isreg() and not hidden(member.name) else None
            if content is not None:
                yield member.name, content
            place = archive.offset
            archive.members.clear()  # type: ignore[attr-defined]  # the headers so far, a list that would grow with the archive


def zip_members(file: IO[bytes], name: str, on_problem: OnProblem) -> Iterator[tuple[str, IO[bytes]]]:
    """The same for a .zip, which must be a file on disk: its table of contents is at its end.

    A member that cannot be opened is reported and passed over.
    """
    with naming_damage(lambda: f"{name}:byte {file.seek(0, 2)}"):
        archive = zipfile.ZipFile(file)
    for member in archive.infolist():
        if member.is_dir() or hidden(member.filename):
            continue
        try:
            content = archive.open(member)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # a wrong header, an unknown compression, a password
            on_problem(Problem(Kind.DAMAGED, f"{name}/{member.filename}:byte 0", f"the archive's member cannot be opened ({error})"))
            continue
        with content:
            yield member.filename, content


def hidden(member: str) -> bool:
    """Whether a file manager left this file in the archive: `.DS_Store`, `._a.txt`, `__MACOSX/a.txt`. Such files are not text."""
    parts = PurePosixPath(member).parts
    return parts[-1].startswith(".") or parts[0] == "__MACOSX" if parts else True
