"""Compressed files as plain bytes, chosen by suffix and unpacked while they are read. Damage is reported with its place."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from megatron.data.input.bad_input import Kind, Problem
from megatron.data.optional import import_optional

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile)
LARGEST_ZSTANDARD_WINDOW = 2**31


class Damaged(Exception):
    """The bytes of a file cannot be read any further."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@contextmanager
def naming_damage(where: Callable[[], str]) -> Iterator[None]:
    """Turns what the unpackers raise into Damaged at the place `where()`; what the machine refused (an error with a number) passes."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Damaged(Problem(Kind.DAMAGED, where(), f"the file is damaged or cut short ({str(error) or type(error).__name__})")) from None


def unpack(file: IO[bytes], suffix: str, name: str) -> IO[bytes]:
    """The content of `file`, compressed as `suffix` says (any other than COMPRESSED_SUFFIXES: not at all). `name` is for messages.

    Raises DatasetError when the package that unpacks it is not installed.
    """
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if suffix == ".bz2":
        return bz2.BZ2File(file)
    if suffix == ".xz":
        return lzma.LZMAFile(file)
    return io.BufferedReader(ZstandardStream(zstandard_for(name), file), 1 << 20) if suffix == ".zst" else file


def zstandard_for(name: str) -> Any:
    return import_optional("zstandard", f"{name}: reading .zst files needs the package zstandard (`pip install zstandard`), or unpack the file first")


class ZstandardStream(io.RawIOBase):
    """The content of a .zst file's frames. Damage or a missing end raises EOFError, as in the standard library's readers."""

    def __init__(self, zstandard: Any, file: IO[bytes]) -> None:
        self._file = file
        self._zstandard = zstandard
        self._frame: Any = None  # the decompressor inside a frame; None between two
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and self._read_more():
            pass
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _read_more(self) -> bool:
        """Unpack another part; False at the end of the file."""
        self._packed = self._packed or self._file.read(1 << 16)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the last frame is not complete")
            return False
        self._frame = self._frame or self._zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTANDARD_WINDOW).decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return True
