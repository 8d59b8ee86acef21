"""What is said on one control connection: a greeting, then requests and replies in turn. tunneld-control(7) is its
description.

    conversation                one request at a time; the next is read when this one is answered
    └─ (watch) typing           ends the waiting for the next event, never a line that is being sent
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from tunneld.config.schema import ControlSettings
from tunneld.control.connection import LineConnection, PeerLeftError
from tunneld.control.login import AUTH, MAX_FAILURES, LoginState
from tunneld.control.reply import Execute, Reply
from tunneld.errors import LimitReachedError, NotAllowedError, RemoteProtocolError, TunneldError, UsageError
from tunneld.wire.lines import Item, Request, format_err, format_item, format_ok, parse_request

MAX_MISTAKES = 10
"""Unreadable lines in a row: a person stops earlier and reads the man page, a program that speaks something else
does not.
"""

BATCH = 16 * 1024
"""Octets of items that are sent at once; a list of a thousand tunnels is 250 KiB."""

HTTP_REQUEST = re.compile(rb"\S+ \S+ HTTP/[0-9.]+")
"""A browser. It must be hung up on, for the body of its request could be lines of ours, written by a page of a
stranger.
"""


@dataclass(frozen=True, slots=True)
class ControlSession:
    """One peer and everything it asks."""

    connection: LineConnection
    entry: LoginState
    settings: Callable[[], ControlSettings]
    execute: Execute
    log: structlog.stdlib.BoundLogger
    opening: trio.CancelScope = field(default_factory=trio.CancelScope)  # ends the wait for a stranger to be known

    async def run(self, greeting: str, deadline: float) -> None:
        """Talk until the peer ends, quits, idles or talks nonsense, or is a stranger still at `deadline` (a time of
        Trio's clock). Raises `PeerLeftError` when it breaks the connection.
        """
        if self.entry.grant is None:
            self.opening.deadline = deadline
        with self.opening:
            await self._talk(greeting)
        if self.opening.cancelled_caught:
            self.log.info("control connection ended: nobody authenticated in time")
            await self._hang_up(LimitReachedError("nobody authenticated in time (control.handshake_timeout)"))

    async def _talk(self, greeting: str) -> None:
        await self.connection.send(format_ok(greeting))
        try:
            await self._answer_all()
        except RemoteProtocolError as error:
            self.log.info("control connection ended: not our protocol", reason=str(error))
            await self._hang_up(error)

    async def _hang_up(self, error: TunneldError) -> None:
        await self.connection.send(format_err(error.code, str(error)))
        await self.connection.read_away()

    async def _answer_all(self) -> None:
        mistakes = 0
        while (line := await self._next_line()) is not None:
            if not line.strip():
                continue
            if HTTP_REQUEST.match(line):
                raise RemoteProtocolError(
                    "this port speaks tunneld-control(7), not HTTP; the HTTP face has its own port"
                )
            try:
                request = parse_request(line)
            except UsageError as error:
                mistakes += 1
                await self._refuse_line(error, mistakes)
                continue
            mistakes = 0
            if await self._answer(request):
                return

    async def _next_line(self) -> bytes | None:
        patience = self.settings().idle_timeout
        with trio.move_on_after(patience):
            return await self.connection.next_line()
        self.log.debug("control connection idled out")
        await self.connection.send(format_err("limit", f"no request came for {patience:g} s; connect again"))
        return None

    async def _refuse_line(self, error: UsageError, mistakes: int) -> None:
        if mistakes == MAX_MISTAKES:
            raise RemoteProtocolError(f"{mistakes} lines in a row were no requests, the last because {error}")
        await self.connection.send(format_err(error.code, str(error)))

    async def _answer(self, request: Request) -> bool:
        """Carry out one request and say how it went. True when the conversation is over."""
        try:
            reply = await self._carry_out(request)
            await self._send_reply(reply)
        except PeerLeftError:
            raise
        except TunneldError as error:
            self.log.debug("control request refused", verb=request.verb, code=error.code, reason=str(error))
            if self.entry.failures >= MAX_FAILURES:
                await self._hang_up(error)
                return True
            await self.connection.send(format_err(error.code, str(error)))
        except Exception:
            self.log.exception("control request failed: a bug", verb=request.verb)
            await self.connection.send(
                format_err("internal", f"{request.verb} failed inside the relay; its log says why")
            )
        else:
            return reply.closing
        return False

    async def _carry_out(self, request: Request) -> Reply:
        if request.verb != AUTH:
            try:
                return await self.execute(request, self.entry.caller)
            except NotAllowedError:
                self.entry.check_standing()
                raise
        reply = self.entry.answer(request)
        if self.entry.grant is not None:
            self.opening.deadline = math.inf
        return reply

    async def _send_reply(self, reply: Reply) -> None:
        closing: AbstractAsyncContextManager[Any] = aclosing(reply.stream) if reply.stream else nullcontext()
        async with closing:
            batch = bytearray()
            for item in reply.items:
                batch += format_item(item)
                if len(batch) >= BATCH:
                    await self.connection.send(batch)
                    batch = bytearray()
            if reply.stream:
                await self.connection.send(batch)
                batch = bytearray()
                await self._watch(reply.stream)
        await self.connection.send(batch + format_ok(reply.text))

    async def _watch(self, stream: AsyncGenerator[Item, None]) -> None:
        """Send what the stream brings until something is typed, the peer ends, or the stream does."""
        if self.connection.typed_ahead:
            return
        typed = _Typed()
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(typed.listen, self.connection)
            try:
                while (item := await typed.interrupt(stream)) is not None:
                    await self.connection.send(format_item(item))
            except Exception as error:  # carried out by hand: a nursery would wrap it in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


class _Typed:
    """Whether the peer has typed, and the waiting that this ends."""

    def __init__(self) -> None:
        self._typed = False
        self._waiting = trio.CancelScope()

    async def listen(self, connection: LineConnection) -> None:
        """Sleep until the peer types or leaves, then end the waiting. Whoever reads next hears how it left."""
        with suppress(PeerLeftError, RemoteProtocolError):
            await connection.wait_typed()
        self._typed = True
        self._waiting.cancel()

    async def interrupt(self, stream: AsyncGenerator[Item, None]) -> Item | None:
        """The next item, or None when the peer has typed or the stream is at its end."""
        if self._typed:
            return None
        with trio.CancelScope() as self._waiting:
            return await anext(stream, None)
        return None
