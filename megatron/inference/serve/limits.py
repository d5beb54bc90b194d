"""What is checked before anything else looks at a request: its host, its key, and the size of its body.

The body is read here, whole and with a limit, so that no other part of the server meets a large or endless one.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from megatron.inference.serve.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
DRAIN_SECONDS = 10.0
"""A client that sends too much may go on for so long before the answer, because many read an answer only when they have sent everything."""


class Gone(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class Guard:
    """hosts: names that a request may call the server by, against pages in a browser that reach it under a name of their own. None: any name.

    key: what a request for the API must send. None: nothing.
    """

    max_body: int
    body_seconds: float
    hosts: frozenset[str] | None = None
    key: str | None = None

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts is not None and name not in self.hosts:
            raise ApiError(403, f"This server answers on this machine only, under the names {', '.join(sorted(self.hosts))}; not as {host!r}.")
        if self.key is None or not path.startswith(("/v1/", "/metrics")):
            return
        given = headers.get(b"authorization", b"").decode("latin-1")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            what = "The key of this request is wrong." if given else "This server needs a key: send the header 'Authorization: Bearer KEY'."
            raise ApiError(401, what, code="invalid_api_key")


class Limited:
    """An application behind a guard."""

    def __init__(self, app: App, guard: Guard) -> None:
        self.app, self.guard = app, guard

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self.guard.check(scope["path"], headers)
            body = await self._read(headers, receive)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, {"connection": "close"})(scope, receive, send)
        except Gone:
            return
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body. Raises ApiError when it is too large or too slow, Gone when nobody waits for the answer any more."""
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return b""
        too_large = ApiError(413, f"The body is larger than this server takes ({self.guard.max_body:,} bytes).", code="body_too_large")
        announced = headers.get(b"content-length", b"0")
        try:
            async with asyncio.timeout(self.guard.body_seconds):
                if announced.isdigit() and int(announced) > self.guard.max_body:
                    if b"expect" not in headers:  # a client with this header sends nothing before it is asked to
                        await _drain(receive)
                    raise too_large
                parts = []
                size = 0
                while True:
                    message = await _next(receive)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.guard.max_body:
                        await _drain(receive)
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"The body of the request did not come within {self.guard.body_seconds:g} seconds.") from None


async def _drain(receive: Receive) -> None:
    """Reads what still comes and keeps none of it, for DRAIN_SECONDS at most."""
    end = time.monotonic() + DRAIN_SECONDS
    while (await _next(receive)).get("more_body", False) and time.monotonic() < end:
        pass


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Gone
    return message


def _replay(body: bytes, receive: Receive) -> Receive:
    """What gives the body once, and then what comes from the client: that it has gone."""
    parts = [body]

    async def receive_again() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return receive_again
