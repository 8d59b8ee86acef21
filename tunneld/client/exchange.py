"""Requests out, replies in, in turn, on one control connection: the part of the client that minds the order of things.

Replies carry no number, so their order is all that tells whose they are. `due` counts the verdicts that have not
come yet: a request adds one, and while more than one is due, what arrives answers a request that was abandoned
(cancelled, too slow) and is thrown away.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import trio

from tunneld.errors import LocalProtocolError, RefusedError, RelayUnreachableError, RemoteProtocolError, reason_of
from tunneld.tls.connection import EXPIRED, NOT_YET, PEER_CLOSED, is_truncation
from tunneld.wire.lines import (
    MAX_REPLY_LINE,
    Err,
    ItemLine,
    LineBuffer,
    Ok,
    ReplyLine,
    Request,
    format_request,
    parse_reply,
)

READ_SIZE = 64 * 1024
"""Octets read at once: a list of 250 tunnels."""

Record = Mapping[str, str]
"""One `*` line of an answer: its keys and values, all strings, as tunneld-control(7) lists them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the relay said: the text behind its OK, and the items before it."""

    text: str = ""
    items: Sequence[Record] = ()


class ControlExchange:
    """One control connection, seen as calls. `relay` names it in messages, `timeout` is the seconds for each answer."""

    def __init__(self, relay: str, stream: trio.abc.Stream, timeout: float) -> None:
        self.timeout = timeout
        self._relay = relay
        self._stream = stream
        self._lines = LineBuffer(MAX_REPLY_LINE)
        self._turn = trio.Lock()
        self._pause = trio.CancelScope()  # between two turns, while somebody waits for the end
        self._due = 0
        self._watching = False
        self._lost = ""

    async def hear_greeting(self) -> str:
        """The text that a relay says first. Raises as `request`, and `RemoteProtocolError` where it is no control
        port.
        """
        self._due = 1
        with self._patience("said nothing"):
            return (await self._answer()).text

    async def request(self, request: Request) -> Answer:
        """Ask and wait for the answer.

        Raises `RefusedError`, `RelayUnreachableError`, `RemoteProtocolError`, and `LocalProtocolError` during a watch.
        """
        async with self._take_turn():
            await self._ask(request)
            with self._patience(f"did not answer {request.verb}"):
                return await self._answer()

    @asynccontextmanager
    async def watch(self, request: Request) -> AsyncIterator[AsyncIterator[Record]]:
        """Ask for a stream of items, which ends with the `async with`."""
        async with self._take_turn():
            await self._ask(request)
            self._watching = True
            try:
                yield _Items(self)
            finally:
                self._watching = False
                if self._due:  # whatever is typed ends it; its verdict is thrown away when it comes
                    with suppress(RelayUnreachableError):
                        await self._send(b"\n")

    async def next_item(self) -> Record | None:
        """The next item of the watch in hand; None at its end. Raises `RefusedError` where it was refused."""
        while self._due:
            line = await self._read()
            if not isinstance(line, ItemLine):
                self._due -= 1
                if not self._due:
                    self._ok(line)
            elif self._due == 1:
                return line.item
        return None

    async def wait_lost(self) -> None:
        """Wait until the connection is of no use any more; the next call says why. Calls come first meanwhile."""
        while not self._lost:
            async with self._turn:
                if not self._turn.statistics().tasks_waiting:
                    with trio.CancelScope() as self._pause, suppress(RelayUnreachableError, RemoteProtocolError):
                        await self._hear_nobody()

    async def _hear_nobody(self) -> None:
        """Nothing is to come but answers that nobody waits for any more, and a last word."""
        while True:
            line = await self._read()
            if not self._due:
                raise self._lose(line.text if isinstance(line, Err) else "it answered what nobody asked")
            if not isinstance(line, ItemLine):
                self._due -= 1

    def _take_turn(self) -> trio.Lock:
        """To be entered. Raises `LocalProtocolError` during a watch."""
        if self._watching:
            raise LocalProtocolError(f"client of relay {self._relay} is watching; connect another one for calls")
        self._pause.cancel()
        return self._turn

    async def _ask(self, request: Request) -> None:
        await self._send(format_request(request))
        self._due += 1

    async def _send(self, data: bytes) -> None:
        """Send whole lines. Half a line would spoil those that follow, hence no cancelling here; the timeout ends
        it.
        """
        if self._lost:
            raise RelayUnreachableError(self._lost)
        with trio.move_on_after(self.timeout, shield=True) as patience:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._lose(why(error)) from None
        if patience.cancelled_caught:
            raise self._lose(f"it took no request for {self.timeout:g} s")

    async def _answer(self) -> Answer:
        items: list[Record] = []
        while True:
            line = await self._read()
            if isinstance(line, ItemLine):
                items.append(line.item)
                continue
            self._due -= 1
            if not self._due:
                return Answer(self._ok(line).text, items)
            items.clear()  # they answered a request that nobody waits for any more

    async def _read(self) -> ReplyLine:
        if self._lost:
            raise RelayUnreachableError(self._lost)
        try:
            while (line := self._lines.next_line()) is None:
                data = await self._stream.receive_some(READ_SIZE)
                if not data:
                    raise self._lose(PEER_CLOSED)
                self._lines.feed(data)
            return parse_reply(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._lose(why(error)) from None
        except RemoteProtocolError as error:
            self._lose(str(error))
            raise RemoteProtocolError(f"relay {self._relay} broke the control protocol: {error}") from None

    def _ok(self, verdict: Ok | Err) -> Ok:
        if isinstance(verdict, Err):
            raise RefusedError(verdict.code, verdict.text)
        return verdict

    def _lose(self, reason: str) -> RelayUnreachableError:
        """The connection is of no use any more; every later call says why."""
        self._lost = f"control connection to relay {self._relay} closed: {reason}"
        return RelayUnreachableError(self._lost)

    @contextmanager
    def _patience(self, failing: str) -> Iterator[None]:
        try:
            with trio.fail_after(self.timeout):
                yield
        except trio.TooSlowError:
            raise RelayUnreachableError(f"relay {self._relay} {failing} for {self.timeout:g} s") from None


class _Items:
    """The items of a watch. Not an async generator, so that leaving it half-read leaves nothing to finalize."""

    def __init__(self, exchange: ControlExchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> _Items:
        return self

    async def __anext__(self) -> Record:
        item = await self._exchange.next_item()
        if item is None:
            raise StopAsyncIteration
        return item


def why(error: BaseException) -> str:
    """The reason behind a stream that broke, from the system or from TLS, for a person."""
    cause = error.__cause__ or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        advice = "pass --pin (printed by `tunneld init`) or --ca FILE"
        if cause.verify_code in {NOT_YET, EXPIRED}:
            now = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
            advice = f"it is {now} UTC by this machine's clock; if that is right, the relay's operator must renew it"
        return f"certificate verification failed ({cause.verify_message}); {advice}"
    if isinstance(cause, ssl.SSLError):
        if is_truncation(cause) or isinstance(cause, ssl.SSLZeroReturnError):
            return PEER_CLOSED
        if cause.reason == "WRONG_VERSION_NUMBER":
            return "it does not speak TLS there; use tcp://"
        return f"TLS failed: {(cause.reason or str(cause)).replace('_', ' ').lower()}"
    return reason_of(cause) if isinstance(cause, OSError) else str(cause) or "it broke"
