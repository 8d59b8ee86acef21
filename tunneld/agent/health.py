"""Whether the local server is well, judged from one look after another. Pure.

                     `unhealthy_after` failures in a row
        healthy ─────────────────────────────────────────► unhealthy
                ◄─────────────────────────────────────────
                     `healthy_after` successes in a row

It counts as healthy until shown otherwise: an agent that starts is of use at once, and a server that is not there yet
refuses its first visitors by itself.

One look at the local server: does it take a connection, does it answer HTTP.

The task that looks at the local server, and has its exposure act on what it sees.

How visitors are turned away while the local server is unhealthy, or does not answer where it speaks HTTP.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import trio

from tunneld.agent.events import Reporter
from tunneld.agent.local import LocalServer
from tunneld.errors import reason_of

INTERVAL = 10.0
"""Seconds between two looks: with three failures half a minute until it shows, as the balancers of this field do."""
TIMEOUT = 5.0
"""Seconds for an answer: a healthy server on the same machine takes milliseconds, one that swaps takes seconds."""
UNHEALTHY_AFTER = 3
"""Failures in a row: one is a restart."""
HEALTHY_AFTER = 2
"""Successes in a row: one can be luck."""
MAX_CHECKS = 100
"""For either of the two; with the shortest useful interval that is minutes."""
PATH = "/"
"""What is asked for over HTTP."""

How = Literal["tcp", "http"]


class UnhealthyPolicy(Enum):
    """What to do with visitors while the local server is unhealthy."""

    ANSWER = "answer"  # say so, where the visitor speaks HTTP; otherwise close at once
    WITHDRAW = "withdraw"  # take none: the relay has others of the same tunnel, or the visitor waits
    TELL = "tell"  # as ever


@dataclass(frozen=True, slots=True)
class Check:
    """How the local server is looked at, and what follows. Times in seconds, `unhealthy_after` and `healthy_after` as
    counts of looks.
    """

    how: How
    path: str = PATH
    interval: float = INTERVAL
    timeout: float = TIMEOUT
    unhealthy_after: int = UNHEALTHY_AFTER
    healthy_after: int = HEALTHY_AFTER
    conduct: UnhealthyPolicy = UnhealthyPolicy.ANSWER


class HealthState:
    """What all looks so far amount to."""

    def __init__(self, check: Check) -> None:
        self.healthy = True
        self._needed = {True: check.unhealthy_after, False: check.healthy_after}  # by what it is now
        self._against = 0  # looks in a row that speak against what it is now

    def look(self, *, passed: bool) -> bool:
        """One more look; tells whether it changed what the local server counts as."""
        self._against = 0 if passed is self.healthy else self._against + 1
        if self._against < self._needed[self.healthy]:
            return False
        self.healthy, self._against = passed, 0
        return True


LARGEST = 1024
"""Octets of a status line, its reason included; the longest in use have 50."""
WELL = range(200, 400)
"""HTTP statuses of a server that is well: a redirect is an answer too."""

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")


async def probe(local: LocalServer, check: Check) -> str | None:
    """Look once. Returns None if all is well, otherwise why not."""
    reason = f"no answer in {check.timeout:g} s"
    with trio.move_on_after(check.timeout):
        try:
            connection = await local.dial()
        except OSError as error:
            return f"could not connect to {local.target}: {reason_of(error)}"
        if check.how == "tcp":
            connection.close()
            return None
        return await _ask(connection, local, check.path)
    return f"{local.target}: {reason}"


async def _ask(connection: socket.socket, local: LocalServer, path: str) -> str | None:
    """`GET` and look at the status line; the rest of the answer is nobody's."""
    host = "localhost" if local.target.path else str(local.target)
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tunnel-health\r\nConnection: close\r\n\r\n"
    async with trio.SocketStream(trio.socket.from_stdlib_socket(connection)) as stream:
        try:
            await stream.send_all(request.encode())
            reason = judge(await _status_line(stream))
        except trio.BrokenResourceError as error:
            reason = reason_of(error.__cause__) if isinstance(error.__cause__, OSError) else "connection lost"
    return reason and f"GET {path} of {local.target}: {reason}"


def judge(line: bytes) -> str | None:
    """None if the line is an HTTP status of a server that is well, otherwise what is wrong with it."""
    if not line:
        return "closed without an answer"
    if (status := _STATUS.match(line)) is None:
        return "the answer is not HTTP"
    return None if int(status[1]) in WELL else f"status {int(status[1])}"


async def _status_line(stream: trio.SocketStream) -> bytes:
    received = b""
    while b"\n" not in received and len(received) < LARGEST:
        more = await stream.receive_some(LARGEST - len(received))
        if not more:
            break
        received += more
    return received


async def watch(local: LocalServer, check: Check, teller: Reporter, act: Callable[[bool], None]) -> None:
    """Look every `check.interval` seconds until cancelled. `act` is told after each look whether the server counts as
    healthy, changed or not, so that what it does holds even where something undid it meanwhile.
    """
    judgement = HealthState(check)
    while True:
        reason = await probe(local, check)
        if judgement.look(passed=reason is None):
            if judgement.healthy:
                teller.report("healthy")
            else:
                teller.report("unhealthy", reason=reason or "")
        act(judgement.healthy)
        await trio.sleep(check.interval)


ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 46\r\n"
    b"Cache-Control: no-store\r\nRetry-After: 10\r\nConnection: close\r\n\r\n"
    b"The server behind this address is unavailable\n"
)
PATIENCE = 5.0
"""Seconds for a visitor to hear the answer. Closing at once would reset the connection of one who still asks, and a
reset drops the answer.
"""
MAX_ANSWERS = 256
"""Visitors who are being answered at once; further ones are closed. Of one relay no more can be waiting by default."""
CHUNK = 65536
"""Octets of a question read at once, for nobody."""


async def answer(stream: trio.abc.HalfCloseableStream) -> None:
    """Say that the server is unavailable, in bounded time, and close."""
    async with stream:
        with trio.move_on_after(PATIENCE), suppress(trio.BrokenResourceError):
            await stream.send_all(ANSWER)
            await stream.send_eof()
            while await stream.receive_some(CHUNK):
                pass
