"""Downloads a file. The file appears only when it is complete. An interrupted download continues where it ended."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron.data.indexed import DatasetError
from megatron.data.locking import lock
from megatron.data.progress import Reporter

PIECE_BYTES = 1 << 18
SECONDS_OF_SILENCE = 60
RANGE_NOT_SATISFIABLE = 416


def download(url: str, path: Path, reporter: Reporter) -> None:
    """Downloads `url` to `path`. After a DatasetError, the same call continues with the missing bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("ab") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise DatasetError(f"another process is downloading {path} right now; wait for it or choose another directory (-d)") from None
        with network_errors(url, path), open_from(url, file.tell()) as response:
            if response.status != http.client.PARTIAL_CONTENT:
                file.truncate(0)  # the server begins anew, whatever it was asked for
            receive(response, file, reporter)
        os.fsync(file.fileno())
    os.replace(partial, path)


def open_from(url: str, start: int) -> Any:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=SECONDS_OF_SILENCE)
    except urllib.error.HTTPError as error:
        if error.code == RANGE_NOT_SATISFIABLE and start:
            return open_from(url, 0)
        raise


def receive(response: Any, file: IO[bytes], reporter: Reporter) -> None:
    start = file.seek(0, os.SEEK_END)
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    with reporter.stage("downloading", total) as stage:
        stage.advance(start, documents=0)
        while piece := response.read(PIECE_BYTES):
            file.write(piece)
            stage.advance(len(piece), documents=0)
    if total is not None and file.tell() < total:
        raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")


@contextmanager
def network_errors(url: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise DatasetError(
            f"{url} could not be downloaded ({getattr(error, 'reason', None) or error}). Check the network. What was downloaded is kept: the same "
            f"command continues from there. Without a network, copy the file to {path}"
        ) from error
