"""The dialogue on one control connection: a greeting, then requests and replies in turn. tunneld-control(7) specifies
it.

    session                     one request at a time; the next is read when this one is answered
    └─ (watch) input monitor    ends the wait for the next event, never the sending of a line
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from tunneld.config.schema import ControlSettings
from tunneld.control.connection import LineConnection, PeerLeftError
from tunneld.control.login import AUTH, MAX_LOGIN_FAILURES, LoginState
from tunneld.directory.reply import ITEMS_PER_STEP, Execute, Reply, Step
from tunneld.errors import LimitReachedError, NotAllowedError, RemoteProtocolError, TunneldError, UsageError
from tunneld.tunnel.events import Event
from tunneld.wire.lines import ControlRequest, Item, format_err, format_item, format_ok, parse_request

MAX_UNREADABLE_LINES = 10
"""Consecutive lines that are no requests: a person stops earlier and reads the manual, a program that speaks another
protocol does not.
"""

LAST_ERROR_TIMEOUT = 2.0
"""Seconds to tell a peer that its time is over: it holds a place of an unauthenticated connection until then."""

REPLY_BATCH = 16 * 1024
"""Bytes of items per send; a list of a thousand tunnels is 250 KiB."""

HTTP_REQUEST_LINE = re.compile(rb"\S+ \S+ HTTP/[0-9.]+")
"""A browser. Its connection must be closed: the body of the request could hold lines of our protocol, written by a
hostile web page.
"""


@dataclass(frozen=True, slots=True)
class ControlSession:
    """One control connection with its login state. The server creates it and calls `run` once."""

    connection: LineConnection
    login: LoginState
    settings: Callable[[], ControlSettings]
    execute: Execute
    log: structlog.stdlib.BoundLogger
    login_scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # its deadline ends when `auth` succeeds

    async def run(self, greeting: str, deadline: float, refusal: TunneldError | None = None) -> None:
        """Answer requests until the peer ends the connection, quits, is idle for too long, breaks the protocol, or has
        not authenticated by `deadline` (Trio's clock). With a `refusal`, send only that. Raises `PeerLeftError` if the
        connection breaks.
        """
        if refusal is not None:
            await self._close_with(refusal)
            return
        if self.login.grant is None:
            self.login_scope.deadline = deadline
        with self.login_scope:
            await self.connection.send(format_ok(greeting))
            await self._answer_all()
        if self.login_scope.cancelled_caught:
            self.login.log_limited(self.log.info, "control connection closed: authentication timed out")
            with trio.move_on_after(LAST_ERROR_TIMEOUT):
                await self._close_with(LimitReachedError("authentication timed out (control.handshake_timeout)"))

    async def _close_with(self, error: TunneldError) -> None:
        """Send a final error and make sure that it arrives; the server then closes the connection."""
        await self.connection.send(format_err(error.code, str(error)))
        await self.connection.discard_input()

    async def _answer_all(self) -> None:
        unreadable = 0
        try:
            while (line := await self._next_line()) is not None:
                if not line.strip():
                    continue
                if HTTP_REQUEST_LINE.match(line):
                    raise RemoteProtocolError(
                        "this port speaks tunneld-control(7), not HTTP; HTTP has its own port, see [http]"
                    )
                try:
                    request = parse_request(line)
                except UsageError as error:
                    unreadable += 1
                    await self._refuse_line(error, unreadable)
                    continue
                unreadable = 0
                if await self._answer(request):
                    return
        except RemoteProtocolError as error:
            event = "control connection closed: peer speaks another protocol"
            self.login.log_limited(self.log.info, event, reason=str(error))
            await self._close_with(error)

    async def _next_line(self) -> bytes | None:
        timeout = self.settings().idle_timeout
        with trio.move_on_after(timeout):
            return await self.connection.next_line()
        self.log.debug("control connection closed: idle")
        text = f"no request for {timeout:g} s (control.idle_timeout); connect again"
        await self.connection.send(format_err("limit", text))
        return None

    async def _refuse_line(self, error: UsageError, unreadable: int) -> None:
        if unreadable == MAX_UNREADABLE_LINES:
            raise RemoteProtocolError(f"{unreadable} unreadable lines in a row, the last one: {error}")
        await self.connection.send(format_err(error.code, str(error)))

    async def _answer(self, request: ControlRequest) -> bool:
        """Execute one request and send its reply. True if the session is over."""
        try:
            reply = await self._execute(request)
            if reply.take is not None:
                self.connection.hand_over(reply.take)
                return True
            await self._send_reply(reply)
        except PeerLeftError:
            raise
        except TunneldError as error:
            self.log.debug("control request refused", verb=request.verb, code=error.code, reason=str(error))
            if self.login.failures >= MAX_LOGIN_FAILURES or self.login.refused:
                await self._close_with(error)
                return True
            await self.connection.send(format_err(error.code, str(error)))
        except Exception:
            self.log.exception("control request failed: a bug", verb=request.verb)
            text = f"{request.verb} failed because of a bug in the relay; see the log of the relay"
            await self.connection.send(format_err("internal", text))
        else:
            return reply.closing
        return False

    async def _execute(self, request: ControlRequest) -> Reply:
        if request.verb != AUTH:
            try:
                return await self.execute(request, self.login.caller)
            except NotAllowedError:
                self.login.check_revoked()
                raise
        reply = self.login.authenticate(request)
        if self.login.grant is not None:
            self.login_scope.deadline = math.inf
        return reply

    async def _send_reply(self, reply: Reply) -> None:
        closing: AbstractAsyncContextManager[Any] = aclosing(reply.stream) if reply.stream else nullcontext()
        async with closing:
            batch = b""
            for first in range(0, len(reply.items), ITEMS_PER_STEP):
                if len(batch) >= REPLY_BATCH:
                    await self.connection.send(batch)
                    batch = b""
                async with reply.step():
                    batch += b"".join(map(format_item, reply.items[first : first + ITEMS_PER_STEP]))
            if reply.stream:
                await self.connection.send(batch)
                batch = b""
                await self._send_stream(reply.stream, reply.step)
        await self.connection.send(batch + format_ok(reply.text))

    async def _send_stream(self, stream: AsyncGenerator[Sequence[Item], None], step: Step) -> None:
        """Send the items of `stream` until it ends, or until the peer sends anything or closes."""
        if self.connection.has_buffered_input:
            return
        monitor = _InputMonitor()
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor.run, self.connection)
            try:
                while (items := await monitor.next_items(stream)) is not None:
                    async with step():
                        lines = b"".join(map(_line, items))
                    await self.connection.send(lines)
            except Exception as error:  # raised after the nursery, which would wrap it in an exception group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


def _line(item: Item) -> bytes:
    return item.line if isinstance(item, Event) else format_item(item)


class _InputMonitor:
    """Interrupts the wait for the next items of a stream when the peer sends input."""

    def __init__(self) -> None:
        self._has_input = False
        self._waiting = trio.CancelScope()

    async def run(self, connection: LineConnection) -> None:
        """Wait until the peer sends anything or the connection ends, then interrupt `next_items`. Errors are left for
        the next read.
        """
        with suppress(PeerLeftError, RemoteProtocolError):
            await connection.wait_for_input()
        self._has_input = True
        self._waiting.cancel()

    async def next_items(self, stream: AsyncGenerator[Sequence[Item], None]) -> Sequence[Item] | None:
        """The next group of items, or None if the peer has sent input or the stream has ended."""
        if self._has_input:
            return None
        with trio.CancelScope() as self._waiting:
            return await anext(stream, None)
        return None
