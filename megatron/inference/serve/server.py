"""Starts the server, says where it listens, and stops it in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console

from megatron.config import disk
from megatron.config.neox import NeoXConfig
from megatron.config.serve import ServeConfig
from megatron.data.tokenizer.companions import folder_of
from megatron.inference.engine import Engine
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.runner import build_runner
from megatron.inference.serve.app import Service, build_app
from megatron.inference.serve.chat import find_template
from megatron.inference.serve.limits import LOOPBACK_NAMES, Guard, Limited
from megatron.inference.serve.prompts import Limits
from megatron.inference.serve.worker import EngineWorker

log = logging.getLogger(__name__)
LOOPBACK = ("127.", "::1", "localhost")
LAST_SECONDS = 5
"""After the running requests were ended, their clients have this long to take the last words."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: NeoXConfig, console: Console) -> None:
    """Answers requests until SIGTERM or Ctrl-C. At the end the console gets what `expert_offload` counted.

    Raises InferenceError for an address or key file that cannot be used (before the model is loaded), and the errors of load_ready_model.
    """
    settings = config.serve
    if config.parallel.layout.pipe > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InferenceError("The server needs the model on one process; add -o pipe_parallel_size=0.")
    key = read_key(settings)
    listening = listen(settings)
    with listening:
        ready = load_ready_model(config)
        service, worker = build_service(config, ready)
        app = Limited(build_app(service), guard_of(settings, key))
        server = OrderlyServer(app, worker, settings, on_start=lambda: announce(settings, service, listening, key))
        asyncio.run(server.serve(sockets=[listening]))
    log.info("Stopped. %s requests, %s tokens generated.", worker.counts["requests"], worker.counts["tokens_generated"])
    if ready.offloaded is not None:
        ready.offloaded.finish(console)


def read_key(settings: ServeConfig) -> str | None:
    """The key that requests must send. None: none. Raises InferenceError when the file cannot be read or has no key in it."""
    if settings.serve_api_key_file is None:
        return None
    path = Path(settings.serve_api_key_file)
    try:
        key = path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeError) as error:
        reason = disk.reason(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InferenceError(f"serve_api_key_file: {path} cannot be read: {reason}.") from error
    if not key.isascii() or not key:
        raise InferenceError(f"serve_api_key_file: the first line of {path} must be the key, of ASCII characters.")
    return key


def listen(settings: ServeConfig) -> socket.socket:
    """A socket on the configured address. Raises InferenceError when the address cannot be used."""
    host, port = settings.serve_host, settings.serve_port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InferenceError(f"serve_host = {host}: this is no address of this machine ({error.strerror}).") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise InferenceError(
            f"The server cannot listen on {host}, port {port}: {error.strerror}. Give another address or port (serve_host, serve_port)."
        ) from error
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    return host.startswith(LOOPBACK)


def guard_of(settings: ServeConfig, key: str | None) -> Guard:
    """What is checked of each request. Behind a loopback address only its usual names are answered, so that no page in a browser gets in under its
    own name (DNS rebinding)."""
    hosts = LOOPBACK_NAMES | {settings.serve_host} if is_loopback(settings.serve_host) else None
    return Guard(settings.serve_max_body_bytes, settings.serve_body_seconds, hosts, key)


def build_service(config: NeoXConfig, ready: ReadyModel) -> tuple[Service, EngineWorker]:
    """The model behind a worker that has not started."""
    settings, context = config.serve, ready.context_length
    engine = Engine(ready, build_runner(ready), maximum_requests=settings.serve_max_running)
    worker = EngineWorker(engine, limit=settings.serve_max_running + settings.serve_max_waiting)
    limits = Limits(min(settings.serve_max_prompt_tokens or context, context), context)
    name = settings.serve_model_name or ready.path.resolve().parent.name or "model"
    return Service(ready, worker, name, limits, find_template(folder_of(config.data))), worker


def announce(settings: ServeConfig, service: Service, listening: socket.socket, key: str | None) -> None:
    """Says what is served where."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("%s.", service.ready.description)
    if not is_loopback(settings.serve_host):
        who = "anyone who can reach this machine" if key is None else "anyone who has the key"
        advice = " Set serve_api_key_file to ask for a key." if key is None else ""
        log.warning("serve_host = %s: %s can use the model. The connection is not encrypted.%s", settings.serve_host, who, advice)
    chat = "" if service.template is not None else " Chat is not available, because the tokenizer has no chat template."
    log.info("Serving '%s' on http://%s:%d (API: http://%s:%d/v1).%s Ctrl-C stops it.", service.name, shown, port, shown, port, chat)


class OrderlyServer(uvicorn.Server):
    """uvicorn with the engine's worker: it starts and stops with the server. After the first signal nothing is admitted, and running requests have
    `serve_shutdown_seconds`; a second Ctrl-C ends them at once. `on_start` is called when requests are answered."""

    def __init__(self, app: Any, worker: EngineWorker, settings: ServeConfig, *, on_start: Callable[[], None]) -> None:
        seconds = settings.serve_shutdown_seconds
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=int(seconds) + LAST_SECONDS
            )
        )
        self._worker, self._seconds, self._on_start = worker, seconds, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the engine before the first request can come."""
        self._worker.start()
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for running requests, for so long, and ends the rest."""
        self._worker.refuse_new()
        if self._worker.admitted:
            log.info("Stopping. %d texts have %g seconds to finish.", self._worker.admitted, self._seconds)
        ending = asyncio.create_task(self._end_later())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await asyncio.to_thread(self._worker.stop)

    async def _end_later(self) -> None:
        await asyncio.sleep(self._seconds)
        await asyncio.to_thread(self._worker.stop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals stop the server in order, and the process then ends with status 0."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python gives signals to the main thread alone
            return
        before = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
