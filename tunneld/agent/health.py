"""Health checks of the local server, and the answer that visitors get while it is unhealthy.

                     `unhealthy_after` failures in a row
        healthy ─────────────────────────────────────────► unhealthy
                ◄─────────────────────────────────────────
                     `healthy_after` successes in a row

The server counts as healthy until checks say otherwise: an agent is useful as soon as it starts, and a server that is
not up yet refuses its first visitors by itself.

`probe` makes one check (does the server accept a connection, does it answer HTTP), `HealthState` judges a series of
them and is pure, `run_checks` is the task that does both, `answer` tells one visitor over HTTP.
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

from tunneld.agent.defaults import CHECK_INTERVAL, CHECK_PATH, CHECK_TIMEOUT, HEALTHY_AFTER, UNHEALTHY_AFTER
from tunneld.agent.events import Reporter
from tunneld.agent.local import LocalServer
from tunneld.errors import reason_of

CheckKind = Literal["tcp", "http"]


class UnhealthyPolicy(Enum):
    """What to do with visitors while the local server is unhealthy."""

    ANSWER = "answer"  # answer with status 503 if checks use HTTP, else close at once
    WITHDRAW = "withdraw"  # take none: the relay gives them to another agent of the tunnel, or they wait
    TELL = "tell"  # serve them as usual, and only report it


@dataclass(frozen=True, slots=True)
class Check:
    """How to check the local server, and what follows. `interval` and `timeout` in seconds, `unhealthy_after` and
    `healthy_after` in checks.
    """

    kind: CheckKind
    path: str = CHECK_PATH
    interval: float = CHECK_INTERVAL
    timeout: float = CHECK_TIMEOUT
    unhealthy_after: int = UNHEALTHY_AFTER
    healthy_after: int = HEALTHY_AFTER
    policy: UnhealthyPolicy = UnhealthyPolicy.ANSWER


class HealthState:
    """The verdict of all checks so far."""

    def __init__(self, check: Check) -> None:
        self.healthy = True
        self._needed = {True: check.unhealthy_after, False: check.healthy_after}  # by the present verdict
        self._against = 0  # checks in a row that contradict it

    def update(self, *, passed: bool) -> bool:
        """Count one more check; returns whether the verdict changed."""
        self._against = 0 if passed is self.healthy else self._against + 1
        if self._against < self._needed[self.healthy]:
            return False
        self.healthy, self._against = passed, 0
        return True


MAX_STATUS_LINE = 1024
"""Bytes of an HTTP status line with its reason; the longest in use have 50."""
HEALTHY_STATUSES = range(200, 400)
"""HTTP statuses of a healthy server: a redirect is an answer, too."""

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")


async def probe(local: LocalServer, check: Check) -> str | None:
    """Check the local server once. Returns None if it passes, else the reason why not."""
    reason = f"no answer in {check.timeout:g} s"
    with trio.move_on_after(check.timeout):
        try:
            connection = await local.dial()
        except OSError as error:
            return f"could not connect to {local.target}: {reason_of(error)}"
        if check.kind == "tcp":
            connection.close()
            return None
        return await _probe_http(connection, local, check.path)
    return f"{local.target}: {reason}"


async def _probe_http(connection: socket.socket, local: LocalServer, path: str) -> str | None:
    """Send a `GET` and judge the status line; the rest of the response is not read."""
    host = "localhost" if local.target.path else str(local.target)
    try:
        reason = judge(await _request_status_line(connection, path, host))
    except trio.BrokenResourceError as error:
        reason = reason_of(error.__cause__) if isinstance(error.__cause__, OSError) else "connection lost"
    return reason and f"GET {path} from {local.target}: {reason}"


def judge(line: bytes) -> str | None:
    """Return None if `line` is the HTTP status line of a healthy server, else what is wrong with it."""
    if not line:
        return "connection closed without a response"
    if (status := _STATUS.match(line)) is None:
        return "the response is not HTTP"
    return None if int(status[1]) in HEALTHY_STATUSES else f"status {int(status[1])}"


async def request_status(connection: socket.socket, path: str, host: str) -> int | None:
    """The status with which a server answers a `GET`; None if it does not speak HTTP. Owns the connection. Raises
    `trio.BrokenResourceError`.
    """
    status = _STATUS.match(await _request_status_line(connection, path, host))
    return int(status[1]) if status is not None else None


async def _request_status_line(connection: socket.socket, path: str, host: str) -> bytes:
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tunnel-health\r\nConnection: close\r\n\r\n"
    async with trio.SocketStream(trio.socket.from_stdlib_socket(connection)) as stream:
        await stream.send_all(request.encode())
        return await _receive_status_line(stream)


async def _receive_status_line(stream: trio.SocketStream) -> bytes:
    received = b""
    while b"\n" not in received and len(received) < MAX_STATUS_LINE:
        data = await stream.receive_some(MAX_STATUS_LINE - len(received))
        if not data:
            break
        received += data
    return received


async def run_checks(local: LocalServer, check: Check, reporter: Reporter, on_result: Callable[[bool], None]) -> None:
    """Check every `check.interval` seconds until cancelled, and report changes.

    `on_result` gets the verdict after each check, changed or not, so that its effect is restored if something undid it.
    """
    state = HealthState(check)
    while True:
        reason = await probe(local, check)
        if state.update(passed=reason is None):
            if state.healthy:
                reporter.report("healthy")
            else:
                reporter.report("unhealthy", reason=reason or "")
        on_result(state.healthy)
        await trio.sleep(check.interval)


ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 46\r\n"
    b"Cache-Control: no-store\r\nRetry-After: 10\r\nConnection: close\r\n\r\n"
    b"The server behind this address is unavailable\n"
)
ANSWER_TIMEOUT = 5.0
"""Seconds for a visitor to read the answer and close. An immediate close while a request still arrives would reset the
connection, and a reset discards the answer.
"""
MAX_ANSWERS = 256
"""Visitors being answered at once; further ones are closed. By default no more can wait at one relay."""
DISCARD_SIZE = 65536
"""Bytes of a request read and discarded at once."""


async def answer(stream: trio.abc.HalfCloseableStream) -> None:
    """Answer one visitor with status 503, in bounded time, and close the stream."""
    async with stream:
        with trio.move_on_after(ANSWER_TIMEOUT), suppress(trio.BrokenResourceError):
            await stream.send_all(ANSWER)
            await stream.send_eof()
            while await stream.receive_some(DISCARD_SIZE):
                pass
