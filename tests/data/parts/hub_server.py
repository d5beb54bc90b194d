"""A small stand-in for the Hugging Face hub: one data set, its tree and its files, with ranges, on this machine. `HF_ENDPOINT` leads to it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`requests`: method, path and range of every request. `cut`: after so many bytes the next answer with a file breaks off."""

    def __init__(self, repository: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, self.folder = repository, folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: int | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        name = str(path.relative_to(self.folder))
        return {"type": "file", "path": name, "size": len(data), "oid": digest[:40], "lfs": {"oid": digest, "size": len(data), "pointerSize": 100}}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        names = json.loads(sent)["paths"] if sent.startswith("{") else re.findall(r"paths=([^&]+)", sent)
        paths = [self.server.folder / unquote(name) for name in names]
        self.json([self.server.entry(path) for path in paths if path.is_file()])

    def answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path).removeprefix("/")
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        repository = self.server.repository
        if re.fullmatch(rf"api.datasets.{repository}(/revision/\w+)?", path):
            self.json({"id": repository, "sha": REVISION, "siblings": [], "private": False, "tags": []})
        elif (tree := re.fullmatch(rf"api.datasets.{repository}/tree/\w+/?(.*)", path)) is not None:
            folder = self.server.folder / tree[1]
            self.json([self.server.entry(file) for file in sorted(folder.rglob("*")) if file.is_file()], 200 if folder.is_dir() else 404)
        elif (found := re.fullmatch(rf"datasets/{repository}/resolve/\w+/(.+)", path)) is not None:
            self.file(self.server.folder / found[1], body=body)
        else:
            self.json({"error": "not here"}, 404)

    def json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def file(self, path: Path, *, body: bool) -> None:
        data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        end = min(int(asked[2]) + 1, len(data)) if asked and asked[2] else len(data)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        if self.server.cut is not None:
            end, self.server.cut = min(end, start + self.server.cut), None
            self.close_connection = True
        self.wfile.write(data[start:end])


@contextmanager
def hub(repository: str, folder: Path) -> Iterator[Hub]:
    server = Hub(repository, folder)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
