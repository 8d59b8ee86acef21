"""What a visitor sends on one connection: requests, one behind the other. It is cut into heads and bodies.

One request is under way at a time; a pipelined one waits in the buffer. Nothing is held but heads, and what came behind
a head in the same read: a body goes on as it comes, as far as it is taken.

A visitor can send a thousand requests ahead in one packet, and leave the responses unread. So each pipelined request
waits for a later turn of the pump, in which all visitors share a part of the time (`TurnBudget.visitors`), and until
the visitor has read what it was sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import structlog

from tunneld.engine.tls_end import TlsEnd
from tunneld.sites.body import Body
from tunneld.sites.heads import RequestReader
from tunneld.wire.http1 import HeadError, RequestHead

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

REQUEST_COST = 12
"""Units of `EngineLimits.turn_cost`: a request that the relay answers itself takes 80 µs."""


class RequestReceiver(Protocol):
    """What the input calls: the visitor's connection."""

    def on_head_begun(self) -> None:
        """A part of the head of the next request has come."""

    def on_request(self, head: RequestHead) -> None:
        """A request begins. The next one comes after `RequestInput.next_request`."""

    def takes_body(self) -> bool:
        """Whether `on_body` may be called now; once it may again, call `RequestInput.resume`."""

    def on_body(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes of the body of the request, as they go on. Valid only during the call."""

    def takes_pipe(self) -> bool:
        """The same for `on_body_pipe`."""

    def on_body_pipe(self, pipe: Pipe) -> bool:
        """Bytes of the body of the request, in a borrowed pipe, which the callee owns. False: take no more until
        `RequestInput.resume` is called.
        """

    def on_refused(self, error: HeadError) -> None:
        """What came is malformed, and nothing behind it can be read."""

    def on_last(self, *, broken_off: bool) -> None:
        """The visitor sends no more, and no request is under way; or, `broken_off`, one that is not complete."""

    def on_internal_error(self, error: Exception) -> None:
        """A bug in one of these."""


class RequestInput:
    """The bytes of a visitor on their way from its end to a `RequestReceiver`. A `DeferredHandler`."""

    __slots__ = (
        "_awaits_head", "_body", "_deferred", "_end", "_max_head", "_paused", "_pending", "_reader", "_receiver",
        "_stopped", "_unread", "ended",
    )  # fmt: skip

    def __init__(self, end: TlsEnd, max_head: int, receiver: RequestReceiver) -> None:
        self.ended = False  # the visitor sends no more
        self._end = end
        self._max_head = max_head
        self._receiver = receiver
        self._reader = RequestReader()
        self._pending = bytearray()  # taken from the end and not used
        self._awaits_head = True  # no request is under way
        self._body: Body | None = None  # of the one under way, unless it is complete
        self._stopped = False
        self._paused = False  # a pipelined request waits for `resume`
        self._deferred = False  # `on_turn` comes
        self._unread = False  # once the visitor has read what it was sent
        end.pipe_taker = self

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come that is not used."""
        return not self._pending and not self._end.buffered

    @property
    def awaits_body(self) -> bool:
        """Whether the request under way is not complete."""
        return self._body is not None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes behind the request under way."""
        return self.ended and not self._pending

    def take(self, data: memoryview) -> int:
        """Take bytes, a head whole and a body as far as the receiver takes it; return how many."""
        if self._paused:
            return 0
        if not self._awaits_head:
            return 0 if self._pending else self._take_body(data)
        begins = not self._pending
        if begins and (head := self._reader.repeated(data)) is not None:
            self._begin(head)
            return len(data)
        taken = min(len(data), self._max_head + 4 - len(self._pending))
        self._pending += data[:taken]
        self._use()
        if begins and self._awaits_head and self._pending:
            self._receiver.on_head_begun()
        if taken < len(data) and not (self._pending or self._paused or self._stopped):
            taken += self.take(data[taken:])  # a body, mostly
        return taken

    def pipe_capacity(self) -> int:
        """See `PipeTaker.pipe_capacity`: what is left of a body of known length."""
        body = self._body
        if body is None or self._pending or not self._receiver.takes_pipe():
            return 0
        return body.left

    def take_pipe(self, pipe: Pipe) -> bool:
        """See `PipeTaker.take_pipe`. Behind the body another request may come, which waits here."""
        body = self._body
        assert body is not None
        body.skip(pipe.count)
        if body.is_over:
            self._body = None
        return self._receiver.on_body_pipe(pipe) or self._body is None

    def end(self) -> None:
        """The visitor sends no more. Complete requests are still received."""
        self.ended = True
        self._use()

    def resume(self) -> None:
        """The receiver takes bytes again."""
        self._paused = False
        self._use()
        end = self._end
        end.read_on()
        while end.buffered and not self._stopped and not self._paused:
            taken = self.take(memoryview(bytes(end.buffered)))
            if not taken:
                return
            end.consume(taken)

    def next_request(self) -> bool:
        """The request under way is answered. Returns whether nothing has come of the next one; call `resume_later`
        otherwise.
        """
        self._awaits_head = True
        self._paused = bool(self._pending or self._end.buffered)
        return not self._paused

    def resume_later(self) -> None:
        """Receive the next request in a later turn."""
        if not self._deferred:
            self._deferred = True
            budget = self._end.engine.budget
            budget.defer(budget.visitors, self)

    def on_turn(self) -> None:
        """See `DeferredHandler`."""
        self._deferred = False
        if self._stopped:
            return
        if not self._end.send_capacity():
            self._unread = True
            return
        self._end.engine.budget.visitors.use(REQUEST_COST)
        self.resume()

    def on_visitor_reads(self) -> None:
        """The visitor has read what it was sent."""
        if self._unread:
            self._unread = False
            self.resume_later()

    def on_failure(self, error: Exception) -> None:
        """See `DeferredHandler`."""
        self._receiver.on_internal_error(error)

    def stop(self) -> bytes:
        """Call the receiver no more. Return what has come and was not used."""
        self._stopped = True
        self._end.pipe_taker = None
        self._receiver = NO_RECEIVER  # there is no reference cycle for the garbage collector
        rest, self._pending = bytes(self._pending), bytearray()
        return rest

    def _use(self) -> None:
        """Go on with what was taken."""
        while self._pending and not self._stopped and not self._paused:
            if not (self._read_head() if self._awaits_head else self._use_body()):
                break
        if self.ended and not self._stopped and not self._paused:
            if self._awaits_head:
                self._receiver.on_last(broken_off=False)
            elif self._body is not None and not self._pending:
                self._receiver.on_last(broken_off=True)

    def _read_head(self) -> bool:
        """False: it is not complete, or malformed."""
        try:
            head = self._reader.take(self._pending, self._max_head)
        except HeadError as error:
            self._receiver.on_refused(error)
            return False
        if head is None:
            return False
        self._begin(head)
        return True

    def _begin(self, head: RequestHead) -> None:
        self._awaits_head = False
        self._body = Body(head.body_length) if head.body_length != 0 else None
        self._receiver.on_request(head)

    def _use_body(self) -> bool:
        """False: the receiver takes nothing now."""
        if self._body is None:
            return False
        taken = self._take_body(memoryview(bytes(self._pending)))
        del self._pending[:taken]
        return taken > 0

    def _take_body(self, data: memoryview) -> int:
        """Pass on bytes of a body; return how many were taken."""
        body = self._body
        if body is None or not self._receiver.takes_body():
            return 0
        try:
            taken, out = body.take(data)
        except HeadError as error:
            self._receiver.on_refused(error)
            return len(data)
        if body.is_over:
            self._body = None
        if len(out):
            self._receiver.on_body(out)
        return taken


class _NoReceiver:
    """The receiver of an input that was stopped."""

    def on_head_begun(self) -> None:
        pass

    def on_request(self, _head: RequestHead) -> None:
        pass

    def takes_body(self) -> bool:
        return False

    def on_body(self, _data: bytes | bytearray | memoryview) -> None:
        pass

    def takes_pipe(self) -> bool:
        return False

    def on_body_pipe(self, _pipe: Pipe) -> bool:
        return False

    def on_refused(self, _error: HeadError) -> None:
        pass

    def on_last(self, *, broken_off: bool) -> None:
        pass

    def on_internal_error(self, error: Exception) -> None:
        log.error("http connection failed: internal error", exc_info=error)


NO_RECEIVER = _NoReceiver()
