"""The one thread that runs the engine, and the calls through which requests reach it and events come back.

The event loop answers clients and never waits for the model; the thread runs the model and knows nothing of clients. Between them is one queue of
orders to the thread, and one queue of events for each call. What a queue holds is bounded: orders by the number of texts that are admitted, events by
the tokens that were asked for.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from megatron.inference.engine import Engine, Event, Request
from megatron.inference.serve.errors import ApiError

log = logging.getLogger(__name__)
STOPPED = "The server is shutting down. Try again later."
BROKEN = "The server made a mistake with this request. Its log says more."


class Call:
    """The texts of one HTTP request."""

    def __init__(self, requests: Sequence[Request], loop: asyncio.AbstractEventLoop, cancel: Callable[[Call], None]) -> None:
        self.requests = tuple(requests)
        self.open = len(self.requests)
        """Texts that have not ended."""
        self.has_failed = False
        self._loop, self._cancel = loop, cancel
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def deliver(self, arrived: Sequence[tuple[int, Event]]) -> None:
        """Called in the engine's thread: (which of the texts, its event)."""
        self._loop.call_soon_threadsafe(self._take, arrived)

    def _take(self, arrived: Sequence[tuple[int, Event]]) -> None:
        for item in arrived:
            self._events.put_nowait(item)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(which of the texts, what happened to it) until all have ended. Raises ApiError if one of them fails."""
        while self.open:
            number, event = await self._events.get()
            if event.finish_reason == "error":
                self.has_failed = True
                raise ApiError(503 if event.message == STOPPED else 500, event.message)
            self.open -= event.finish_reason is not None
            yield number, event

    def cancel(self) -> None:
        """Ends what has not ended. Nobody waits for it any more."""
        self._cancel(self)


class EngineWorker:
    """Runs the engine in a thread of its own. `limit`: texts that may be in work or wait."""

    def __init__(self, engine: Engine, *, limit: int) -> None:
        self._engine, self._limit = engine, limit
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._texts: dict[int, tuple[Call, int]] = {}
        """The engine's number -> whose text it is. The thread's own."""
        self._calls: dict[Call, int] = {}
        """Open calls -> texts of each. The event loop's own."""
        self._is_stopping = self._is_over = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.counts: Counter[str] = Counter()
        """What happened since the start. Each number is written by one thread only."""

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def admitted(self) -> int:
        """Texts in work or waiting."""
        return sum(self._calls.values())

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._is_stopping

    def check_room(self, texts: int) -> None:
        """Called in the event loop. Raises ApiError when there are too many texts for so many more, or the server stops."""
        if self._is_stopping:
            raise ApiError(503, STOPPED)
        if texts > self._limit:
            raise ApiError(400, f"The request asks for {texts:,} texts, and this server takes at most {self._limit:,} at a time.", param="n")
        if self.admitted + texts > self._limit:
            self.counts["requests_refused"] += 1
            busy = f"The server is busy: {self.admitted:,} texts run or wait, and it takes {self._limit:,}. Try again later."
            raise ApiError(429, busy, code="queue_full")

    def submit(self, requests: Sequence[Request]) -> Call:
        """Called in the event loop. Raises ApiError as `check_room` does."""
        self.check_room(len(requests))
        call = Call(requests, asyncio.get_running_loop(), self._release)
        self._calls[call] = len(requests)
        self.counts["requests"] += 1
        self._orders.put(lambda: self._admit(call))
        return call

    def _release(self, call: Call) -> None:
        """Called in the event loop, once for each call, whether it has ended or not."""
        if self._calls.pop(call, None) is not None and call.open:
            self.counts["requests_failed" if call.has_failed else "requests_cancelled"] += 1
            self._orders.put(lambda: self._drop(call))

    def refuse_new(self) -> None:
        """Called in the event loop: from now on nothing is admitted."""
        self._is_stopping = True

    def stop(self) -> None:
        """Ends all texts with an error, and the thread. Waits for the step that runs."""
        self._is_stopping = True
        self._orders.put(self._finish)
        if self._thread.is_alive():
            self._thread.join()

    # ---- in the thread

    def _work(self) -> None:
        while not self._is_over:
            self._take_orders()
            if self._engine.busy and not self._is_over:
                self._step()

    def _take_orders(self) -> None:
        """Carries out what was ordered. With nothing to do it waits for an order."""
        try:
            self._orders.get(block=not self._engine.busy)()
            while True:
                self._orders.get_nowait()()
        except queue.Empty:
            return

    def _admit(self, call: Call) -> None:
        for number, request in enumerate(call.requests):
            try:
                self._texts[self._engine.submit(request)] = (call, number)
            except ValueError as error:
                call.deliver([(number, _failure(str(error)))])

    def _drop(self, call: Call) -> None:
        for name in [name for name, (owner, _) in self._texts.items() if owner is call]:
            self._engine.cancel(name)
            del self._texts[name]

    def _finish(self) -> None:
        self._fail_all(STOPPED)
        self._is_over = True

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception:  # one mistake must not end the server: whoever waits is told, and the next request starts afresh
            log.exception("The engine failed.")
            self._fail_all(BROKEN)
            return
        arrived: dict[Call, list[tuple[int, Event]]] = {}
        for event in events:
            call, number = self._texts[event.request]
            arrived.setdefault(call, []).append((number, event))
            self._count(event)
        for call, its_events in arrived.items():
            call.deliver(its_events)

    def _count(self, event: Event) -> None:
        self.counts["tokens_generated"] += event.token is not None
        if event.finish_reason is not None:
            call, number = self._texts.pop(event.request)
            self.counts[f"texts_ended_by_{event.finish_reason}"] += 1
            self.counts["tokens_in_prompts"] += len(call.requests[number].tokens)

    def _fail_all(self, message: str) -> None:
        for name, (call, number) in self._texts.items():
            self._engine.cancel(name)
            call.deliver([(number, _failure(message))])
        self._texts.clear()


def _failure(message: str) -> Event:
    return Event(-1, finish_reason="error", message=message)
