"""Tells the user if the local server does not do what visitors will expect of it.

It may refuse requests for its public name: Vite, webpack, Django, Rails and others do. The bytes of visitors pass the
agent unseen. So it asks the local server itself, once, when the first visitor has come: for the public name and, if
that is refused, for the local one.

Or it may not speak TLS, although the address that is printed begins with https. The agent finds that out at its start:
a server that answers no ClientHello but a plain request is one.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress

import trio

from tunneld.agent.defaults import CHECK_TIMEOUT
from tunneld.agent.events import Reporter
from tunneld.agent.health import request_status
from tunneld.agent.local import LocalServer

TLS_RECORDS = frozenset({b"\x15", b"\x16"})
"""The first byte of an alert and of a handshake record (RFC 8446 §5.1)."""
REFUSALS = frozenset({400, 403, 404, 421})
"""Statuses for an unknown host: 400 of Django, 403 of Vite and Rails, 404 and 421 of servers with virtual hosts."""


async def report_refused_host(local: LocalServer, public: str, expected: str, reporter: Reporter) -> None:
    """Report if requests for the host `public` are refused, and requests for `expected` are not."""
    with trio.move_on_after(CHECK_TIMEOUT):
        status = await _status(local, public)
        if status in REFUSALS and await _status(local, expected) not in {None, *REFUSALS}:
            reason = (
                f"the local server refuses requests for {public} (status {status}) but not for {expected}; "
                "use --host-header local"
            )
            reporter.report("trouble", reason=reason, repeated=0)


async def report_plain_http(local: LocalServer, reporter: Reporter) -> None:
    """Report if the local server answers plain HTTP only."""
    with trio.move_on_after(2 * CHECK_TIMEOUT):
        if not await _speaks_tls(local) and await _status(local, str(local.target)) is not None:
            reason = (
                f"the local server {local.target} speaks plain HTTP, so browsers cannot open the https address; use "
                "--http, or let the relay end TLS for a host name with --host"
            )
            reporter.report("trouble", reason=reason, repeated=0)


async def _speaks_tls(local: LocalServer) -> bool:
    """Whether the local server answers a ClientHello with a TLS record; True also if it cannot be reached."""
    answer = b""
    with trio.move_on_after(CHECK_TIMEOUT / 5):
        try:
            connection: socket.socket = await local.dial()
            async with trio.SocketStream(trio.socket.from_stdlib_socket(connection)) as stream:
                await stream.send_all(_client_hello())
                answer = bytes(await stream.receive_some(1))
        except OSError:
            return True
        except trio.BrokenResourceError:
            return False
    return answer in TLS_RECORDS


def _client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    session = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


async def _status(local: LocalServer, host: str) -> int | None:
    try:
        return await request_status(await local.dial(), "/", host)
    except (OSError, trio.BrokenResourceError):
        return None
