"""Waiting for the engine on behalf of a client: an answer in one piece, or a stream of server-sent events. A client that goes away ends its texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from megatron.inference.serve.errors import ApiError
from megatron.inference.serve.prompts import Prompt
from megatron.inference.serve.replies import Choice, Heading, usage
from megatron.inference.serve.worker import Call

STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
CLIENT_GONE = 499
"""The status for the log when nobody reads the answer (the number that nginx uses)."""


@dataclass(frozen=True)
class Reply:
    """An answer in the making."""

    heading: Heading
    prompts: Sequence[Prompt]
    choices: Sequence[Choice]
    echo: bool = False
    stream_usage: bool = False

    async def whole(self, call: Call) -> dict[str, Any]:
        """The answer when all of it is there. Raises ApiError."""
        async for number, event in call.events():
            self.choices[number].add(event)
        return self.heading.whole([choice.whole(echo=self.echo) for choice in self.choices], usage(self.prompts, self.choices))

    async def parts(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        """The answer piece by piece. Raises ApiError."""
        for choice in self.choices:
            for opening in choice.opening(echo=self.echo):
                yield self.heading.part([opening])
        async for number, event in call.events():
            part = self.choices[number].add(event)
            if part is not None:
                yield self.heading.part([part])
        if self.stream_usage:
            yield self.heading.part([], usage(self.prompts, self.choices))


async def answer(reply: Reply, call: Call, http: HttpRequest) -> Response:
    """The answer in one piece. Raises ApiError."""
    working = asyncio.ensure_future(reply.whole(call))
    leaving = asyncio.ensure_future(_disconnected(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(working.result()) if working.done() else Response(status_code=CLIENT_GONE)
    finally:
        working.cancel()
        leaving.cancel()
        call.cancel()


class EventStream(Response):
    """The answer as server-sent events, `data: [DONE]` last. A failure is sent as an event too, because the status has gone out before."""

    def __init__(self, reply: Reply, call: Call) -> None:
        super().__init__()
        self.reply, self.call = reply, call

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        await self._until_first({asyncio.ensure_future(self._send_all(send)), asyncio.ensure_future(_disconnected(receive))})

    async def _until_first(self, tasks: set[asyncio.Future[None]]) -> None:
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except OSError:  # the connection broke while a part was sent
            return
        finally:
            for task in tasks:
                task.cancel()
            self.call.cancel()

    async def _send_all(self, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            async for part in self.reply.parts(self.call):
                await send(_event(json.dumps(part, ensure_ascii=False)))
            await send(_event("[DONE]"))
        except ApiError as error:
            await send(_event(json.dumps(error.body(), ensure_ascii=False)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(errors="replace"), "more_body": True}


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
