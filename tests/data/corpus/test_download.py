"""A download that goes on where it ended, from a real server on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron.data.corpus.download import download
from megatron.data.indexed import DatasetError
from megatron.data.progress import LineReporter

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """`ranges`: whether parts are served; `stop_after`: bytes after which connections end."""

    ranges = True
    stop_after: int | None = None
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.path != "/file":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if asked and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:][: self.server.stop_after])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server: Server, path: Path, name: str = "file") -> str:
    out = StringIO()
    download(f"http://127.0.0.1:{server.server_port}/{name}", path, LineReporter(Console(file=out, width=200)))
    return out.getvalue()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path, ranges: bool) -> None:
    path = tmp_path / "folder" / "file.bin"
    server.ranges, server.stop_after = ranges, 300_000
    with pytest.raises(
        DatasetError, match=r"/file could not be downloaded \(.*\)\. Check the network\. What was downloaded is kept: the same command"
    ):
        fetch(server, path)
    assert not path.exists()
    server.stop_after = None
    assert "downloading: 1.0 MB" in fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


def test_one_killed_between_the_last_byte_and_the_name_begins_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.partial").write_bytes(CONTENT)
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-", None]


def test_no_such_file_and_no_server_are_explained(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"/other could not be downloaded \(Not Found\)"):
        fetch(server, tmp_path / "file.bin", "other")
    with pytest.raises(DatasetError, match=r"could not be downloaded \(.*refused.*\)\. Check the network\."):
        download("http://127.0.0.1:9/file", tmp_path / "file.bin", LineReporter(Console(file=StringIO())))
