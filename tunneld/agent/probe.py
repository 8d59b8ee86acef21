"""One look at the local server: does it take a connection, does it answer HTTP."""

from __future__ import annotations

import re
import socket

import trio

from tunneld.agent.health import Check
from tunneld.agent.local import LocalServer
from tunneld.errors import reason_of

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
