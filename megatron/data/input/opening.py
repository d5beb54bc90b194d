"""Looks at a file's first bytes and then reads the whole file; reads UTF-16 text as UTF-8."""

from __future__ import annotations

import codecs
import io
from typing import IO, Any, NamedTuple

from megatron.data.input.compression import DAMAGE
from megatron.data.input.contents import HEAD_BYTES

LONGEST_SPACE = 16 << 20  # of nothing but white space before something is said


class Begun(NamedTuple):
    """`head`: the first bytes of `file`, which still begins with them. `whole`: there are no more."""

    head: bytes
    whole: bool
    file: IO[bytes]


def begin(file: Any, *, seekable: bool) -> Begun:
    """Looks at the first HEAD_BYTES bytes, or more if they are only white space. Damage in them is raised later, when they are read from the
    result."""
    head, failure, ended = bytearray(), None, False
    if seekable:
        file.peek(1)  # fills the buffer, in which going back is free: nothing is read, and counted, twice
    while not ended and (len(head) < HEAD_BYTES or (len(head) < LONGEST_SPACE and not head.strip())):
        try:
            piece = file.read1(HEAD_BYTES)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            failure = error
            break
        head += piece
        ended = not piece
    if seekable and failure is None:
        file.seek(0)
        return Begun(bytes(head), ended, file)
    return Begun(bytes(head), ended, io.BufferedReader(Rewound(bytes(head), file, failure), 1 << 20))


class Rewound(io.RawIOBase):
    """`head`, then what is left of `file`; or then `failure`, where reading `file` ended with it."""

    def __init__(self, head: bytes, file: Any, failure: Exception | None = None) -> None:
        self._head, self._file, self._failure = memoryview(head), file, failure

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._head[: len(buffer)]
        if piece:
            self._head = self._head[len(piece) :]
        elif self._failure is not None:
            raise self._failure
        else:
            piece = self._file.read1(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class Recoded(io.RawIOBase):
    """Text in another encoding, as UTF-8. Bytes that are wrong in that encoding raise EOFError, as damage does."""

    def __init__(self, file: Any, encoding: str) -> None:
        self._file, self._encoding, self._decoder = file, encoding, codecs.getincrementaldecoder(encoding)()
        self._ready, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            data = self._file.read1(HEAD_BYTES)
            self._ended = not data
            try:
                self._ready = self._decoder.decode(data, final=self._ended).encode()
            except UnicodeError as error:
                raise EOFError(f"not {self._encoding.upper()}: {error}") from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def recoded(file: IO[bytes], encoding: str) -> IO[bytes]:
    return io.BufferedReader(Recoded(file, encoding), 1 << 20)
