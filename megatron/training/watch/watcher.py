"""The thread of each process that watches its own main thread and, on the first process, all the others.

Every process tells the first one each second where it is. When the run hangs (verdict.py), the first process asks every process for its stacks,
prints them and ends the run. A process that dies closes its connection, so all others know of it at once, whatever they wait for.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from select import select
from typing import Any, NoReturn

from megatron.mpu.topology import Topology
from megatron.training.watch.place import Account, Observer, Place
from megatron.training.watch.verdict import hangs, report
from megatron.training.watch.wire import Line, Message, call, listen

HANG_STATUS = 124
"""The exit status of all processes of a run that hung, as that of timeout(1)."""
FAILURE_STATUS = 1
LOOK_S = 1.0
ANSWER_S = 10.0
"""How long the first process waits for the stacks of the others."""
OWN_WORDS_S = 0.3
"""After another process has failed, this one may fail of the same cause within this time. Then it says so itself."""
HANG_UP_S = 0.5
"""How long a process that leaves waits for the others to read its last words."""
GRACE_S = 5.0
"""A main thread that has lost another process has this time to end by itself."""
LOST = re.compile(r"gloo|nccl|connection (?:reset|closed|refused)|broken pipe|socket", re.IGNORECASE)
"""What torch says when the other end of a collective operation is gone."""


class PeerFailed(RuntimeError):
    """Another process of the run has failed or died. The message is empty if it was printed before."""


@contextmanager
def watching(topology: Topology, limit_s: float, *, device_type: str) -> Iterator[Watcher]:
    """Watches this process and the others until the end of the block.

    `limit_s`: collective_timeout_s; 0: only for processes that die. An exception that leaves the block is made known to the other processes, which
    then end too. An exception that is only the echo of another process's end becomes PeerFailed.
    """
    host = os.environ["MASTER_ADDR"]
    watcher: Watcher = First(topology, limit_s, device_type, host) if topology.is_first else Other(topology, limit_s, device_type, host)
    watcher.start()
    try:
        yield watcher
    except BaseException as error:
        if isinstance(error, RuntimeError) and LOST.search(str(error)) and (sentence := watcher.reason()) is not None:
            watcher.leave({"lost": True})
            raise PeerFailed(sentence) from None
        watcher.leave({"failed": f"{type(error).__name__}: {error}".removesuffix(": ").splitlines()[0]})
        raise
    watcher.leave({"bye": True})


class Watcher:
    """What is the same on the first process and on the others. The thread runs from `start` to `leave`."""

    def __init__(self, topology: Topology, limit_s: float, device_type: str, host: str) -> None:
        self.rank = topology.rank
        self.world_size = topology.world_size
        self.limit_s = limit_s or float("inf")
        self.observer = Observer(topology.rank, counts_cpu=device_type == "cpu")
        self.host = host
        self.stopped: str | None = None
        """Why the run ends, when another process has failed. None: it goes on."""
        self._last_words: Message | None = None
        self._said = False
        self._ended = threading.Event()
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    @abstractmethod
    def connect(self) -> None:
        """Before the thread starts. Raises OSError."""

    @abstractmethod
    def turn(self, readable: list[Any]) -> None:
        """Once a second, and when something has arrived on the sockets."""

    @abstractmethod
    def sockets(self) -> list[Any]: ...

    @abstractmethod
    def lines_left(self) -> list[Line]:
        """The connections that are open."""

    @abstractmethod
    def tell(self, message: Message) -> None:
        """Sends a message to everyone that this process is connected with."""

    def start(self) -> None:
        try:
            self.connect()
        except OSError as error:
            sys.stderr.write(f"[process {self.rank}] This process is not watched for a hang: {error}.\n")
            self._ended.set()
            return
        self._thread.start()

    def leave(self, last_words: Message) -> None:
        """Ends the thread. A failure is made known first, and the others have a moment to say that they stop: so this process speaks last."""
        if self._ended.is_set():
            return
        self._last_words = last_words
        self._wake.send(b"x")
        self._thread.join(GRACE_S)
        if "failed" in last_words and self.stopped is None:
            time.sleep(2 * OWN_WORDS_S)

    def reason(self) -> str | None:
        """What other processes say about the failure that this one sees the echo of: empty if it was printed. None: nothing is known."""
        end = time.monotonic() + GRACE_S
        while self.stopped is None and not self._ended.is_set() and time.monotonic() < end:
            time.sleep(0.05)
        if self.stopped is None or self._said:
            return None if self.stopped is None else ""
        self._said = True
        return self.stopped

    def stop(self, sentence: str, *, status: int = FAILURE_STATUS) -> None:
        """Ends this process: by itself within GRACE_S, or else here."""
        if self.stopped is not None:
            return
        self.stopped = sentence
        begin = time.monotonic()
        while time.monotonic() - begin < GRACE_S:
            if self._last_words is not None:
                return
            if time.monotonic() - begin > OWN_WORDS_S:
                self.say(sentence)
            time.sleep(0.05)
        end_now(status)

    def say(self, sentence: str) -> None:
        if not self._said:
            self._said = True
            sys.stderr.write(f"[process {self.rank}] {sentence}\n")

    def _run(self) -> None:
        while self._last_words is None:
            readable, _, _ = select([self._woken, *self.sockets()], [], [], LOOK_S)
            if self._last_words is None:
                self._arm()
                self.turn(readable)
        faulthandler.cancel_dump_traceback_later()
        self.tell(self._last_words)
        self.hang_up()
        self._ended.set()

    def hang_up(self) -> None:
        """Closes the connections when the others have read what was said: a socket that is closed with something unread takes its last words back."""
        lines = self.lines_left()
        for line in lines:
            line.finish()
        end = time.monotonic() + HANG_UP_S
        while (open_lines := [line for line in lines if not line.closed]) and time.monotonic() < end:
            for line in select(open_lines, [], [], HANG_UP_S)[0]:
                list(line.messages())
        for line in lines:
            line.close()

    def _arm(self) -> None:
        """If compiled code keeps Python's lock, this thread stands still as well. Then the stacks come from a thread that needs no lock."""
        if self.limit_s != float("inf"):
            faulthandler.dump_traceback_later(self.limit_s + ANSWER_S, file=sys.__stderr__ or 2)


class First(Watcher):
    """On the first process: hears all others, and judges."""

    def __init__(self, topology: Topology, limit_s: float, device_type: str, host: str) -> None:
        super().__init__(topology, limit_s, device_type, host)
        self.lines: dict[int, Line] = {}
        self.names: dict[int, str] = {}
        self.places: dict[int, tuple[Place, float]] = {}
        """Where each process was, and when it said so."""
        self.accounts: dict[int, Account] = {}
        self._strangers: list[Line] = []
        self._left: set[int] = set()
        self._beat = 0.0

    def connect(self) -> None:
        self.server, self.word = listen(self.host)

    def sockets(self) -> list[Any]:
        return [self.server, *self._strangers, *self.lines_left()]

    def lines_left(self) -> list[Line]:
        return [line for line in self.lines.values() if not line.closed]

    def tell(self, message: Message) -> None:
        for line in self.lines.values():
            if not line.closed:
                line.send(message)

    def turn(self, readable: list[Any]) -> None:
        self._hear(readable)
        now = time.monotonic()
        if now - self._beat < LOOK_S:
            return
        self._beat = now
        self.tell({"alive": True})
        self.places[0] = (self.observer.look(), now)
        places = self.now()
        if len(places) == self.world_size and not self._left and hangs(list(places.values()), self.limit_s):
            self._end_hanging_run()

    def now(self) -> dict[int, Place]:
        """The places; a process that says nothing stands still."""
        now = time.monotonic()
        return {rank: replace(place, still_s=place.still_s + now - said) for rank, (place, said) in sorted(self.places.items())}

    def _hear(self, readable: list[Any]) -> None:
        if self.server in readable:
            connection, _ = self.server.accept()
            connection.settimeout(ANSWER_S)
            self._strangers.append(Line(connection))
        for line in [line for line in self._strangers if line in readable]:
            self._strangers.remove(line)
            self._admit(line)
        for rank, line in self.lines.items():
            if line in readable:
                for message in line.messages():
                    self._take(rank, message)
                if line.closed and rank not in self._left:
                    self._left.add(rank)
                    self._someone_failed(rank, "is gone without a word: it was ended from outside, or by the system")

    def _admit(self, line: Line) -> None:
        """The first message of a connection has to hold the word that is in the store."""
        try:
            said = list(line.messages())
        except ValueError:
            said = []
        if not said or said[0].get("word") != self.word:
            line.close()
            return
        self.lines[said[0]["rank"]] = line
        self.names[said[0]["rank"]] = said[0]["name"]
        for message in said[1:]:
            self._take(said[0]["rank"], message)

    def _take(self, rank: int, message: Message) -> None:
        if "place" in message:
            self.places[rank] = (Place(**message["place"]), time.monotonic())
        elif "account" in message:
            self.accounts[rank] = Account.from_json(message["account"])
        else:
            self._left.add(rank)
            if "failed" in message:
                self._someone_failed(rank, f"failed with {message['failed']}")

    def _someone_failed(self, rank: int, what: str) -> None:
        step = f" Its last known step is {self.places[rank][0].step + 1}." if rank in self.places else ""
        sentence = f"Stopping, because process {rank} ({self.names[rank]}) {what}.{step}"
        self.tell({"stop": sentence, "status": FAILURE_STATUS})
        self.stop(sentence)

    def _end_hanging_run(self) -> NoReturn:
        self.accounts = {0: self.observer.account()}
        self.tell({"account": True})
        end = time.monotonic() + ANSWER_S
        while len(self.accounts) < self.world_size and time.monotonic() < end:
            readable, _, _ = select(self.sockets(), [], [], 0.2)
            self._hear(readable)
        sys.stderr.write(report(self.now(), self.accounts, self.limit_s))
        self.tell({"stop": "", "status": HANG_STATUS})
        self.hang_up()
        end_now(HANG_STATUS)


class Other(Watcher):
    """On every process but the first: says where it is, and does as it is told."""

    def connect(self) -> None:
        self.line = call(self.host, self.rank)
        self._heard = time.monotonic()
        self._beat = 0.0
        self._first_is_done = False

    def sockets(self) -> list[Any]:
        return self.lines_left()

    def lines_left(self) -> list[Line]:
        return [] if self.line.closed else [self.line]

    def tell(self, message: Message) -> None:
        self.line.send(message)

    def turn(self, readable: list[Any]) -> None:
        if self.line in readable:
            self._heard = time.monotonic()
            for message in self.line.messages():
                self._obey(message)
        if self._first_is_done:
            return
        if self.line.closed:
            self.stop(f"Stopping, because process 0 ({self.host}) is gone without a word: it was ended from outside, or by the system.")
            return
        now = time.monotonic()
        if now - self._beat >= LOOK_S:
            self._beat = now
            self.tell({"place": vars(self.observer.look())})
        if now - self._heard > self.limit_s + 2 * ANSWER_S:
            self._first_is_silent(now - self._heard)

    def _obey(self, message: Message) -> None:
        if "account" in message:
            self.tell({"account": self.observer.account().as_json()})
        elif "bye" in message:
            self._first_is_done = True
        elif "failed" in message:
            self.stop(f"Stopping, because process 0 ({self.host}) failed with {message['failed']}.")
        elif "stop" in message and message["status"] == HANG_STATUS:
            end_now(HANG_STATUS)
        elif "stop" in message:
            self.stop(message["stop"])

    def _first_is_silent(self, seconds: float) -> NoReturn:
        account = self.observer.account()
        sys.stderr.write(report({self.rank: account.place}, {self.rank: account}, self.limit_s))
        sys.stderr.write(f"Process 0 ({self.host}) has said nothing for {seconds:.0f} s: it is stopped, or its machine cannot be reached.\n")
        end_now(HANG_STATUS)


def end_now(status: int) -> NoReturn:
    """The main thread may wait for ever in compiled code, so it is not asked."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
