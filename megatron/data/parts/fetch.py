"""Gets the files of a corpus in the background, a few at a time, while others are tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import BoundedSemaphore, Thread

from megatron.data.parts.record import InputFile

AT_ONCE = 4


class Fetcher:
    """Downloads files ahead of their use. `fetch` gets a file by its number and may raise."""

    def __init__(self, fetch: Callable[[int], InputFile]) -> None:
        self._fetch_file = fetch
        self._places = BoundedSemaphore(AT_ONCE)
        self._started: dict[int, Future[InputFile]] = {}

    def ahead(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number not in self._started:
                self._started[number] = Future()
                Thread(target=self._fetch, args=(number, self._started[number]), daemon=True).start()  # Ctrl-C does not wait for it

    def _fetch(self, number: int, future: Future[InputFile]) -> None:
        with self._places:
            try:
                future.set_result(self._fetch_file(number))
            except Exception as error:
                future.set_exception(error)

    def has(self, number: int) -> bool:
        """Whether the file is there, or nothing has been done yet to get it."""
        return number not in self._started or self._started[number].done()

    def file(self, number: int) -> InputFile:
        """Waits for the file. Raises DatasetError."""
        return self._started.pop(number).result() if number in self._started else self._fetch_file(number)
