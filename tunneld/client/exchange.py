"""Requests and replies, in order, on one control connection.

Replies carry no number: only their order says to which request they belong. `_pending` counts the verdicts (OK or ERR)
that have not arrived yet. A request adds one. While more than one is pending, what arrives answers a request that was
abandoned (cancelled or timed out) and is discarded.
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
"""Bytes read at once: a list of 250 tunnels."""

Record = Mapping[str, str]
"""One `*` line of an answer: its keys and values, all strings, as tunneld-control(7) lists them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The relay's answer to one request: the text after its OK, and the items before it."""

    text: str = ""
    items: Sequence[Record] = ()


class ControlExchange:
    """One control connection as calls. `relay` is its name in messages, `timeout` the seconds to wait for each answer.
    The caller owns the stream.
    """

    def __init__(self, relay: str, stream: trio.abc.Stream, timeout: float) -> None:
        self.timeout = timeout
        self._relay = relay
        self._stream = stream
        self._lines = LineBuffer(MAX_REPLY_LINE)
        self._turn = trio.Lock()
        self._idle_read = trio.CancelScope()  # around reading between requests, in `wait_lost`
        self._pending = 0  # verdicts
        self._watching = False
        self._lost = ""

    async def receive_greeting(self) -> str:
        """Receive the text that a relay sends first. Raises as `request`, and `RemoteProtocolError` if the peer does
        not speak the control protocol.
        """
        self._pending = 1
        with self._timeout_for("sent no greeting"):
            return (await self._receive_answer()).text

    async def request(self, request: Request) -> Answer:
        """Send a request and wait for its answer.

        Raises `RefusedError`, `RelayUnreachableError`, `RemoteProtocolError`, and `LocalProtocolError` during a watch.
        """
        async with self._take_turn():
            await self._send_request(request)
            with self._timeout_for(f"did not answer {request.verb}"):
                return await self._receive_answer()

    @asynccontextmanager
    async def watch(self, request: Request) -> AsyncIterator[AsyncIterator[Record]]:
        """Send a request that streams items, until the end of the `async with`."""
        async with self._take_turn():
            await self._send_request(request)
            self._watching = True
            try:
                yield _Items(self)
            finally:
                self._watching = False
                if self._pending:  # any line ends the stream; its verdict is discarded when it arrives
                    with suppress(RelayUnreachableError):
                        await self._send(b"\n")

    async def next_item(self) -> Record | None:
        """Return the next item of the current watch, None at its end. Raises `RefusedError` if it was refused."""
        while self._pending:
            line = await self._read()
            if not isinstance(line, ItemLine):
                self._pending -= 1
                if not self._pending:
                    _checked(line)
            elif self._pending == 1:
                return line.item
        return None

    async def wait_lost(self) -> None:
        """Wait until the connection is lost; the next call raises the reason. Calls meanwhile take precedence."""
        while not self._lost:
            async with self._turn:
                if not self._turn.statistics().tasks_waiting:
                    with trio.CancelScope() as self._idle_read, suppress(RelayUnreachableError, RemoteProtocolError):
                        await self._read_unrequested()

    async def _read_unrequested(self) -> None:
        """Read the answers to abandoned requests; anything else, such as an error before the relay closes, ends the
        connection.
        """
        while True:
            line = await self._read()
            if not self._pending:
                raise self._lose(line.text if isinstance(line, Err) else "unexpected reply")
            if not isinstance(line, ItemLine):
                self._pending -= 1

    def _take_turn(self) -> trio.Lock:
        """Return the lock that serializes requests, to be entered. Raises `LocalProtocolError` during a watch."""
        if self._watching:
            raise LocalProtocolError(
                f"this client of relay {self._relay} is watching events; use another client for calls"
            )
        self._idle_read.cancel()
        return self._turn

    async def _send_request(self, request: Request) -> None:
        await self._send(format_request(request))
        self._pending += 1

    async def _send(self, data: bytes) -> None:
        """Send whole lines. Cannot be cancelled, because half a line would corrupt the lines after it; bounded by the
        timeout.
        """
        if self._lost:
            raise RelayUnreachableError(self._lost)
        with trio.move_on_after(self.timeout, shield=True) as scope:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._lose(why(error)) from None
        if scope.cancelled_caught:
            raise self._lose(f"the relay read no request for {self.timeout:g} s")

    async def _receive_answer(self) -> Answer:
        items: list[Record] = []
        while True:
            line = await self._read()
            if isinstance(line, ItemLine):
                items.append(line.item)
                continue
            self._pending -= 1
            if not self._pending:
                return Answer(_checked(line).text, items)
            items.clear()  # of an abandoned request

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

    def _lose(self, reason: str) -> RelayUnreachableError:
        """Mark the connection as lost; every later call raises the same reason."""
        self._lost = f"connection to relay {self._relay} lost: {reason}"
        return RelayUnreachableError(self._lost)

    @contextmanager
    def _timeout_for(self, failure: str) -> Iterator[None]:
        """Bound the block by the timeout. `failure` completes "relay ..."."""
        try:
            with trio.fail_after(self.timeout):
                yield
        except trio.TooSlowError:
            raise RelayUnreachableError(f"relay {self._relay} {failure} in {self.timeout:g} s") from None


class _Items:
    """The items of a watch. Not an async generator, which would need finalizing when left half-read."""

    def __init__(self, exchange: ControlExchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> _Items:
        return self

    async def __anext__(self) -> Record:
        item = await self._exchange.next_item()
        if item is None:
            raise StopAsyncIteration
        return item


def _checked(verdict: Ok | Err) -> Ok:
    """Return an OK; raise `RefusedError` for an ERR."""
    if isinstance(verdict, Err):
        raise RefusedError(verdict.code, verdict.text)
    return verdict


def why(error: BaseException) -> str:
    """The reason for a broken stream, from the operating system or from TLS, for the user."""
    cause = error.__cause__ or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        advice = "pass --pin (printed by `tunneld init`) or --ca FILE"
        now = f"it is {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by this machine's clock"
        if cause.verify_code == EXPIRED:
            advice = f"{now}; if that is right, the relay's operator must renew it"
        elif cause.verify_code == NOT_YET:
            advice = f"{now}; if that is wrong, correct it, otherwise the certificate is for a later time"
        return f"certificate verification failed ({cause.verify_message}); {advice}"
    if isinstance(cause, ssl.SSLError):
        if is_truncation(cause) or isinstance(cause, ssl.SSLZeroReturnError):
            return PEER_CLOSED
        if cause.reason == "WRONG_VERSION_NUMBER":
            return "the relay does not use TLS on this port; use tcp://"
        return f"TLS error: {(cause.reason or str(cause)).replace('_', ' ').lower()}"
    return reason_of(cause) if isinstance(cause, OSError) else str(cause) or "connection broken"
