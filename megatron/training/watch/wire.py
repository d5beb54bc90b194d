"""Lines of JSON over TCP between the watchers. The system closes a connection when a process dies, whatever the process was doing."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch.distributed import distributed_c10d

Message = dict[str, Any]
KEY = "megatron/watch"
"""In the store of the processes: where the first process listens, and the word that a caller has to say first."""
PATIENCE_S = 30.0
"""For one connection, or for one message to be sent."""


class Line:
    """A connection. `messages` never waits longer than the socket's time-out; `closed` says that the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.closed = False
        self._received = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def messages(self) -> Iterator[Message]:
        """What has arrived. Call it when the socket is readable."""
        try:
            received = self.socket.recv(1 << 20)
        except OSError:
            received = b""
        self.closed = self.closed or not received
        *whole, self._received = (self._received + received).split(b"\n")
        for text in whole:
            yield json.loads(text)

    def finish(self) -> None:
        """Nothing more will be sent."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()


def listen(host: str) -> tuple[socket.socket, str]:
    """A socket for the other processes' watchers, on the address where the processes meet if it is this machine's, and the word they have to say."""
    word = secrets.token_hex(16)
    try:
        server = socket.create_server((host, 0), family=family_of(host), backlog=1024)
    except OSError:
        server = socket.create_server(("", 0), backlog=1024)
    distributed_c10d._get_default_store().set(KEY, json.dumps([server.getsockname()[1], word]))
    return server, word


def call(host: str, rank: int) -> Line:
    """Connects to the first process. Raises OSError."""
    port, word = json.loads(distributed_c10d._get_default_store().get(KEY))
    connection = socket.create_connection((host, port), timeout=PATIENCE_S)
    line = Line(connection)
    line.send({"word": word, "rank": rank, "name": f"{socket.gethostname()}, pid {os.getpid()}"})
    return line


def family_of(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
