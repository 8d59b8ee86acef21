"""People at both ends of a tunnel, in threads, for as long as their block lasts."""

from __future__ import annotations

import hashlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from tests.machine.inside.tools import PATIENCE, WrongError, expect, wait_until

BLOCK = random.Random(7).randbytes(1 << 14)
PAUSE = 0.03
"""Seconds between two blocks: other things must go on beside."""


def dial(uri: str) -> socket.socket:
    """A connection to `tcp://HOST:PORT` or `http://HOST:PORT/`."""
    host, port = re.findall(r"//([^:/]+):(\d+)", uri)[0]
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    """Until its end."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def pair(server: str, client: str) -> tuple[socket.socket, socket.socket]:
    """A hidden server and its visitor, who have met."""
    hidden, visitor = dial(server), dial(client)
    hidden.sendall(b"x")
    expect(visitor.recv(1), b"x", "what the visitor got first")
    return hidden, visitor


class Transfer:
    """Octets from a hidden server to a visitor; its end compares hashes."""

    def __init__(self, server: str, client: str) -> None:
        self.octets = 0
        self.may_be_cut = False
        self._hidden, self._visitor = dial(server), dial(client)
        self._enough = False
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self._error: OSError | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=[one], daemon=True) for one in (self._send, self._receive)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.must_move()
        return self

    def __exit__(self, *exc: object) -> None:
        self._enough = True
        if exc[0] is not None:
            return
        for thread in self._threads:
            thread.join(PATIENCE)
        if self.may_be_cut:
            return
        if self._error is not None:
            raise WrongError(f"transfer: {self._error}")
        expect(self._hashes[1].hexdigest(), self._hashes[0].hexdigest(), "hash of what arrived")

    def must_move(self) -> None:
        """Raises `WrongError` where no more octets arrive."""
        before = self.octets
        wait_until("octets arrive", lambda: self._error is not None or self.octets > before + (1 << 17), every=0.1)
        if self._error is not None:
            raise WrongError(f"transfer: {self._error}")

    def _guarded(self, what: Callable[[], None]) -> None:
        try:
            what()
        except OSError as error:
            self._error = error

    def _send(self) -> None:
        number = 0
        while not self._enough:
            number += 1
            block = number.to_bytes(8, "big") + BLOCK
            self._hashes[0].update(block)
            self._hidden.sendall(block)
            time.sleep(PAUSE)
        self._hidden.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while chunk := self._visitor.recv(1 << 16):
            self.octets += len(chunk)
            self._hashes[1].update(chunk)
        self._visitor.close()


class Greeter:
    """A hidden server that dials in for each visitor, whatever happens."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._ended = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._serve, daemon=True).start()

    def __exit__(self, *exc: object) -> None:
        self._ended.set()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                with dial(self._server) as connection:
                    connection.sendall(b"hello")
                    connection.shutdown(socket.SHUT_WR)
                    read_all(connection)
            except OSError:
                self._ended.wait(0.1)


class Visitors:
    """One after the other, and what each got: an answer, or what went wrong."""

    def __init__(self) -> None:
        self.answers: list[str] = []

    def more_must_come(self, count: int = 3) -> None:
        """So many more than now. Raises `WrongError`."""
        before = len(self.answers)
        wait_until("visitors are answered", lambda: len(self.answers) > before + count, every=0.1)


@contextmanager
def visitors(client: str) -> Iterator[Visitors]:
    """They come until the block ends."""
    made, enough = Visitors(), threading.Event()

    def visit() -> None:
        while not enough.is_set():
            try:
                with dial(client) as connection:
                    made.answers.append(read_all(connection).decode() or "nothing")
            except OSError as error:
                made.answers.append(str(error))
            enough.wait(0.1)

    thread = threading.Thread(target=visit, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        enough.set()
        thread.join(PATIENCE)
