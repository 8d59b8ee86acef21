"""Requests and replies, in order, on one control connection.

    task ──► request ──► relay        many may be unanswered at once, up to `MAX_UNANSWERED`
    task ◄── verdict ◄── relay        replies carry no number: only their order says to which request they belong

`_unanswered` has the requests whose verdict (OK or ERR) has not arrived, oldest first. A request that was abandoned
(cancelled or timed out) stays there, and its reply is discarded when it arrives. There is no task for reading: one of
the tasks that wait for a reply reads for all of them, and another one takes over when it has its own.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from tunneld.errors import LocalProtocolError, RefusedError, RelayUnreachableError, RemoteProtocolError, reason_of
from tunneld.tls.connection import EXPIRED, NOT_YET, PEER_CLOSED
from tunneld.tls.session import is_truncation
from tunneld.wire.lines import (
    MAX_REPLY_LINE,
    ControlRequest,
    Err,
    ItemLine,
    LineBuffer,
    Ok,
    ReplyLine,
    format_request,
    parse_reply,
)

READ_SIZE = 64 * 1024
"""Bytes read at once: a list of 250 tunnels."""
MAX_UNANSWERED = 64
"""Requests on their way at once. With 64 a process opens 500 tunnels in a second over a line with a round trip of
60 ms, and a request that cannot wait (the agent is told to stop) is not behind hundreds.
"""

MAX_ITEMS = 200_000
"""Items of one answer: a relay with 100 000 tunnels (100 MiB here) fits, one that never ends its answer does not."""

TextRecord = Mapping[str, str]
"""One `*` line of an answer: its keys and values, all strings, as tunneld-control(7) lists them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The relay's answer to one request: the text after its OK, and the items before it."""

    text: str = ""
    items: Sequence[TextRecord] = ()


@dataclass(slots=True, eq=False)
class _Pending:
    """A request whose verdict has not arrived, and the items that have."""

    sent_at: float  # in `trio.current_time`
    items: list[TextRecord] = field(default_factory=list)
    verdict: Ok | Err | None = None
    abandoned: bool = False


class ControlExchange:
    """One control connection as calls. `relay` is its name in messages, `timeout` the seconds to wait for each answer.
    The caller owns the stream.
    """

    def __init__(self, relay: str, stream: trio.abc.Stream, timeout: float) -> None:
        self.timeout = timeout
        self._relay = relay
        self._stream = stream
        self._lines = LineBuffer(MAX_REPLY_LINE)
        self._turn = trio.Lock()  # to send
        self._unanswered: deque[_Pending] = deque()
        self._answered_at = 0.0  # when the last verdict arrived, in `trio.current_time`
        self._waiting: dict[trio.Event, Callable[[], bool]] = {}  # of tasks that wait while another one reads
        self._reading = False
        self._read_scope = trio.CancelScope()
        self._watch: _Pending | None = None
        self._silent = False  # no answer came in time, to any request
        self._lost = ""

    @property
    def answering(self) -> bool:
        """False once the connection is lost, and while the relay has not answered in time."""
        return not (self._lost or self._silent)

    async def receive_greeting(self) -> str:
        """Receive the text that a relay sends first. Raises as `request`, and `RemoteProtocolError` if the peer does
        not speak the control protocol.
        """
        return (await self._receive_answer(self._expect_answer(), "sent no greeting")).text

    async def request(self, request: ControlRequest) -> Answer:
        """Send a request and wait for its answer. `timeout` begins again with each answer to an earlier request.

        Raises `RefusedError`, `RelayUnreachableError`, `RemoteProtocolError`, and `LocalProtocolError` during a watch.
        """
        failure = f"did not answer {request.verb}"
        self._check_not_watching()
        try:
            self._turn.acquire_nowait()  # mostly free, and `acquire` would pass the turn to every other task
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            pending = await self._send_request(request, failure)
        finally:
            self._turn.release()
        return await self._receive_answer(pending, failure)

    @asynccontextmanager
    async def watch(self, request: ControlRequest) -> AsyncIterator[AsyncIterator[TextRecord]]:
        """Send a request that streams items, until the end of the `async with`."""
        self._check_not_watching()
        async with self._turn:
            self._watch = pending = await self._send_request(request, f"did not answer {request.verb}")
            try:
                yield _Items(self)
            finally:
                self._watch = None
                pending.abandoned = True
                pending.items.clear()
                if pending.verdict is None:  # any line ends the stream
                    with suppress(RelayUnreachableError):
                        await self._send(b"\n")
                self._hand_over()

    async def next_item(self) -> TextRecord | None:
        """Return the next item of the current watch, None at its end. Raises `RefusedError` if it was refused."""
        watch = self._watch
        if watch is None:
            return None
        await self._wait_until(lambda: bool(watch.items) or watch.verdict is not None, watching=True)
        if watch.items:
            return watch.items.pop(0)
        if watch.verdict is not None:
            _checked(watch.verdict)
        return None

    def take_rest(self) -> bytes:
        """What was received behind the last answer: the connection has become something else."""
        return self._lines.take_rest()

    async def wait_lost(self) -> str:
        """Wait until the connection is lost, and return the reason, which the next call raises. Calls can be made
        meanwhile.
        """
        with suppress(RelayUnreachableError, RemoteProtocolError):
            await self._wait_until(lambda: False)
        return self._lost

    def give_up(self, reason: str) -> None:
        """Count the connection as lost: every call that waits, and every later one, raises `reason`."""
        self._lose(reason)
        self._read_scope.cancel()

    # Sending

    def _check_not_watching(self) -> None:
        if self._watch is not None:
            raise LocalProtocolError(
                f"this client of relay {self._relay} is watching events; use another client for calls"
            )

    async def _send_request(self, request: ControlRequest, failure: str) -> _Pending:
        """Send a request once fewer than `MAX_UNANSWERED` are unanswered."""
        text, asked_at = format_request(request), trio.current_time()
        await self._wait_in_time(lambda: len(self._unanswered) < MAX_UNANSWERED, asked_at, failure)
        pending = self._expect_answer()  # first: another task may read the answer before this one runs again
        await self._send(text)
        return pending

    def _expect_answer(self) -> _Pending:
        pending = _Pending(trio.current_time())
        self._unanswered.append(pending)
        return pending

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

    # Receiving

    async def _receive_answer(self, pending: _Pending, failure: str) -> Answer:
        """Wait for the verdict of a request. `failure` completes "relay ..." if it does not come in time."""
        try:
            await self._wait_in_time(lambda: pending.verdict is not None, pending.sent_at, failure)
        except BaseException:
            pending.abandoned = True
            pending.items.clear()
            raise
        assert pending.verdict is not None
        return Answer(_checked(pending.verdict).text, pending.items)

    async def _wait_in_time(self, done: Callable[[], bool], since: float, failure: str) -> None:
        """As `_wait_until`. Raises `RelayUnreachableError` if no answer to any request comes within the timeout."""
        while not done():
            deadline = max(since, self._answered_at) + self.timeout
            if trio.current_time() >= deadline:
                self._silent = True
                raise RelayUnreachableError(f"relay {self._relay} {failure} in {self.timeout:g} s")
            with trio.move_on_at(deadline):
                await self._wait_until(done)

    async def _wait_until(self, done: Callable[[], bool], *, watching: bool = False) -> None:
        """Wait until `done`, and read for all waiting tasks if none of them does. Only a task that is `watching` reads
        during a watch: what it has not consumed stays with the relay.

        Raises `RelayUnreachableError` once the connection is lost, and `RemoteProtocolError`.
        """
        while not done():
            if self._lost:
                raise RelayUnreachableError(self._lost)
            if self._reading or not self._may_read(watching):
                await self._wait_for_reader(done)
                continue
            self._reading = True
            try:
                while self._may_read(watching):
                    self._dispatch(await self._read())
                    if done():
                        break
            finally:
                self._reading = False
                self._hand_over()
        if not self._reading:  # this task was to read, and has what it waited for
            self._hand_over()

    def _may_read(self, watching: bool) -> bool:
        return watching or self._watch is None

    async def _wait_for_reader(self, done: Callable[[], bool]) -> None:
        """Wait until `done`, or until this task is to read."""
        woken = trio.Event()
        self._waiting[woken] = done
        try:
            await woken.wait()
        except BaseException:
            if woken.is_set() and not self._reading:
                self._hand_over()
            raise
        finally:
            self._waiting.pop(woken, None)

    def _hand_over(self) -> None:
        """No task reads now: have another one look whether it is to."""
        for woken in list(self._waiting):
            del self._waiting[woken]
            woken.set()
            if self._watch is None:
                return

    def _dispatch(self, line: ReplyLine) -> None:
        """Give a line to the request that it answers. A line that answers none, such as an error before the relay
        closes, ends the connection.
        """
        if not self._unanswered:
            raise self._lose(line.text if isinstance(line, Err) else "unexpected reply")
        pending, self._silent = self._unanswered[0], False
        if not isinstance(line, ItemLine):
            self._unanswered.popleft()
            self._answered_at = trio.current_time()
            pending.verdict = line
        elif not pending.abandoned:
            if len(pending.items) >= MAX_ITEMS:
                raise self._lose(f"answer of more than {MAX_ITEMS} items")
            pending.items.append(line.item)
        for woken in [woken for woken, done in self._waiting.items() if done()]:
            del self._waiting[woken]
            woken.set()

    async def _read(self) -> ReplyLine:
        try:
            while (line := self._lines.next_line()) is None:
                data: bytes | bytearray = b""
                with trio.CancelScope() as self._read_scope:
                    data = await self._stream.receive_some(READ_SIZE)
                if self._lost:  # given up
                    raise RelayUnreachableError(self._lost)
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
        self._lost = self._lost or f"connection to relay {self._relay} lost: {reason}"
        for woken in self._waiting:
            woken.set()
        self._waiting.clear()
        return RelayUnreachableError(self._lost)


class _Items:
    """The items of a watch. Not an async generator, which would need finalizing when left half-read."""

    def __init__(self, exchange: ControlExchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> _Items:
        return self

    async def __anext__(self) -> TextRecord:
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
