"""Shows runs while they train: as a file that is written again and again, or from a server on this machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.analysis.dashboard.content import sections
from megatron.analysis.dashboard.run import Run, name_runs
from megatron.analysis.page import page_html, parts_html, write_page

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
"""Names under which the server answers, so that no page in a browser gets in under its own (DNS rebinding)."""


class DashboardError(ValueError):
    """What was asked for cannot be shown. The message says why."""


def open_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders (or metrics.jsonl files). A folder may still be empty.

    Raises DashboardError if one does not exist or is given twice.
    """
    found = [Path(path) for path in paths]
    for path in found:
        if not path.exists():
            raise DashboardError(f"{path}: there is no such folder. Give the folder that a run saves to (the key `save`), or its metrics.jsonl.")
        if path.is_file() and path.suffix != ".jsonl":
            raise DashboardError(f"{path}: this is no metrics file (its name would end in .jsonl). Give the folder that a run saves to.")
    if len({path.resolve() for path in found}) < len(found):
        raise DashboardError("A run is given twice.")
    return [Run(path, name) for path, name in zip(found, name_runs(found), strict=True)]


class Dashboard:
    """The page of some runs. Several threads may ask for it."""

    def __init__(self, runs: Sequence[Run], *, every: float) -> None:
        self.runs = runs
        self.every = every
        self._lock = threading.Lock()
        self._parts: tuple[str, str] = ("", "")

    def page(self, *, live: bool, refresh: bool = True) -> str:
        """All of the page, with Plotly. `live`: a server answers. `refresh`: the page asks for new numbers."""
        with self._lock:
            self._read()
            names = ", ".join(run.name for run in self.runs)
            seconds = self.every if refresh else None
            return page_html(f"Training: {names}", sections(self.runs), refresh_seconds=seconds, live=live)

    def parts(self) -> tuple[str, str]:
        """(version, the page without Plotly). The version changes when there is something new, and at least twice a minute."""
        with self._lock:
            self._read()
            version = f"{'-'.join(str(run.version) for run in self.runs)}-{int(time.time() // 30)}"
            if self._parts[0] != version:
                self._parts = (version, parts_html(sections(self.runs)))
            return self._parts

    def _read(self) -> None:
        for run in self.runs:
            run.refresh()


def write_repeatedly(dashboard: Dashboard, path: Path, *, once: bool, stop: Callable[[float], object] = time.sleep) -> None:
    """Writes the page to `path`, and again every `dashboard.every` seconds until Ctrl-C. `once`: one time, and the page does not reload itself.

    Raises DashboardError if `path` is a folder, and the system's OSError if the file cannot be written.
    """
    if path.is_dir():
        raise DashboardError(f"--output {path}: this is a folder. Give the name of a file in it, such as {path / 'page.html'}.")
    while True:
        write_page(path, dashboard.page(live=False, refresh=not once))
        if once:
            return
        stop(dashboard.every)


def build_app(dashboard: Dashboard) -> Any:
    """The server's application: `/` is the page, `/?parts` its content alone."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    def index(request: Request) -> Response:  # in a thread, as it waits for files
        if "parts" not in request.query_params:
            return HTMLResponse(dashboard.page(live=True), headers={"cache-control": "no-store"})
        version, page = dashboard.parts()
        if request.query_params.get("have") == version:
            return Response(status_code=204)
        return HTMLResponse(page, headers={"etag": version, "cache-control": "no-store"})

    return Starlette(routes=[Route("/", index)], middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES))])


def serve(dashboard: Dashboard, *, port: int) -> None:
    """Answers on this machine's own address until Ctrl-C or SIGTERM. Port 0: the system chooses one. Raises DashboardError if the port is taken."""
    import socket

    import uvicorn

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise DashboardError(f"The page cannot be served on port {port}: {error.strerror}. Give another one with --port, or 0 for any.") from error
    log.info("The page is at http://%s:%d/ (only on this machine). Ctrl-C stops it; the runs go on.", HOST, listening.getsockname()[1])
    uvicorn.Server(
        uvicorn.Config(build_app(dashboard), log_config=None, log_level="warning", access_log=False, server_header=False, lifespan="off")
    ).run(sockets=[listening])
