"""The requests of one visitor's connection to one tunnel, as an end that a tunnel can relay.

    relay reads     requests, as the hidden server shall read them: `feed`
    relay writes    the hidden server's responses; they are parsed to know where each ends
    relay resets    no response will come, or not all of it
    relay finishes  the hidden server has closed: it may do so between two responses

A response is passed on while it arrives. It belongs to the request that was sent last, for only one is under way; bytes
that come without a request are an error of the hidden server, and the connection to it is cut.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from tunneld.engine.end import BufferedEnd
from tunneld.engine.failures import TcpSocket
from tunneld.engine.limits import UNLIMITED
from tunneld.engine.tls_end import TlsEnd
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.sites.body import Body
from tunneld.sites.heads import ResponseReader
from tunneld.wire.http1 import HeadError, RequestHead, ResponseHead

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe
    from tunneld.sites.receivers import ResponseReceiver, UpgradedReceiver

IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))
"""Methods of requests that may be sent twice (RFC 9110 §9.2.2)."""

NOTHING = b""

REFUSAL_STATUSES = {
    RefusalKind.ADDRESS: 403,
    RefusalKind.DENIED: 403,
    RefusalKind.PER_SOURCE: 429,
    RefusalKind.RATE: 429,
}
"""The answers to refused visitors; every other one is a 503."""


class RequestStream(BufferedEnd):
    """The requests of one visitor's connection to one tunnel, as an end. See the description of this module."""

    __slots__ = (
        "_body", "_connection", "_left", "_reader", "_request", "_upgraded", "_visitor", "_waits", "continued",
        "is_reusable", "keeps_visitor", "listed_in", "refusal", "response_started", "responses", "was_relayed",
    )  # fmt: skip

    def __init__(self, visitor: TlsEnd, connection: ResponseReceiver) -> None:
        """`visitor` is the end of the visitor, which `connection` owns."""
        super().__init__(visitor.engine)
        self.quantum = self.engine.buffer_size  # behind which pipes are worth while
        self._visitor = visitor
        self._connection = connection
        self._upgraded: UpgradedReceiver | None = None
        self._request: RequestHead | None = None  # whose response is awaited, or under way
        self._reader = ResponseReader()
        self._body: Body | None = None  # of the response under way
        self._waits = False  # `on_requests_taken` is due
        self._left = False  # the connection wants to hear no more of this stream
        self.listed_in: set[RequestStream] | None = None  # of its site; it takes itself off at its end
        self.was_relayed = False  # it got a connection to the hidden server
        self.refusal: AdmissionRefusal | None = None  # the tunnel did not accept it
        self.responses = 0  # that are complete
        self.continued = False  # the hidden server has asked for the body of the request
        self.response_started = False  # bytes of the one under way were passed on
        self.is_reusable = True  # the hidden server reads another request behind this one, and the tunnel takes it
        self.keeps_visitor = True  # the visitor's connection outlives the response

    # Called by the connection

    @property
    def failure_status(self) -> int:
        """The status of the answer to the request under way, if no response to it comes."""
        if self.was_relayed:
            return 502
        return REFUSAL_STATUSES.get(self.refusal.kind, 503) if self.refusal is not None else 503

    def may_repeat(self, request: RequestHead) -> bool:
        """Whether a request that got no response can be sent again through another stream: this one was in use before,
        so the hidden server may have closed it just then.
        """
        return self.responses > 0 and request.body_length == 0 and request.method in IDEMPOTENT

    def send_request(self, request: RequestHead, head: bytes) -> None:
        """Feed the head of a request, as the hidden server shall read it. The response to it comes next."""
        self._request = request
        self.continued = self.response_started = False
        self.feed(memoryview(head))
        self._waits = bool(self.buffered)

    def feed_requests(self, data: memoryview) -> None:
        """Feed bytes of a body that the hidden server shall read, while `buffered` is empty."""
        self.feed(data)
        self._waits = bool(self.buffered)

    @property
    def takes_pipe(self) -> bool:
        """Whether `feed_pipe` may be called now: the hidden server has a connection of its own, which takes bytes."""
        return self.pipe_taker is not None and self.pipe_taker.pipe_capacity() > 0

    def feed_pipe(self, pipe: Pipe) -> bool:
        """Feed bytes of a body in a borrowed pipe, which the relay owns from now on. False: some of them wait, and
        `on_requests_taken` is due.
        """
        assert self.pipe_taker is not None
        self.was_relayed = True
        is_taken = self.pipe_taker.take_pipe(pipe)
        self._waits = self._waits or not is_taken
        return is_taken

    def upgrade(self, receiver: UpgradedReceiver) -> None:
        """Pass all bytes to `receiver` from now on, as they are."""
        self._upgraded = receiver

    def leave(self) -> None:
        """No more requests: the hidden server is told an end of file, as by any visitor that has finished."""
        self._left = self._upgraded is None
        self.engine.call_after_batch(self._feed_eof)

    def refuse(self, refusal: AdmissionRefusal) -> None:
        """Called by the tunnel: it does not accept this visitor."""
        self.refusal = refusal
        self.reset(refusal.reason)

    def abandon(self, reason: str) -> None:
        """Cut: the request will not be completed, or no visitor is left to read its response."""
        self._left = True
        self.engine.call_after_batch(partial(self._break, reason))

    # Called by the site

    def retire(self) -> None:
        """The tunnel takes no more requests: end behind the response under way, or now where there is none."""
        self.is_reusable = False
        if self._request is None and self._upgraded is None and not (self._left or self.closed):
            self._settle("")
            self.leave()

    # Called by the relay

    def send_capacity(self) -> int:
        """See `BufferedEnd.send_capacity`."""
        if self.closed or self.eof_sent:
            return 0
        if self._left:  # what still comes is discarded; the visitor may be gone
            return self.engine.buffer_size
        return self._visitor.send_capacity()

    def write(self, data: memoryview) -> None:
        """See `BufferedEnd.write`: bytes of responses."""
        while len(data) and not self._left:
            if self._upgraded is not None:
                self._upgraded.on_response_data(data)
                return
            taken = self._write_head(data) if self._body is None else self._write_body(data)
            data = data[taken:]

    def pipe_capacity(self) -> int:
        """See `BufferedEnd.pipe_capacity`: bytes of which it is known that they are no head."""
        if self._left or self.closed or self.eof_sent:
            return 0
        left = UNLIMITED if self._upgraded is not None else self._body.left if self._body is not None else 0
        return min(left, self._visitor.pipe_capacity()) if left else 0

    def write_pipe(self, pipe: Pipe) -> None:
        """See `BufferedEnd.write_pipe`."""
        count, body = pipe.count, self._body
        self._visitor.write_pipe(pipe)
        count -= pipe.count
        (self._upgraded or self._connection).on_response_spliced(count)
        if body is not None and not self._left:
            body.skip(count)
            if body.is_over:
                self._complete()

    def read_on(self) -> None:
        """See `BufferedEnd.read_on`."""
        self._consumed(0)

    def send(self, data: bytes) -> None:
        """See `BufferedEnd.send`. Nothing but the hidden server's bytes goes to a visitor."""
        raise NotImplementedError

    def finish(self) -> None:
        """See `End.finish`: the hidden server has sent its last byte."""
        if self.eof_sent or self.closed:
            return
        self.eof_sent = True
        if self._upgraded is not None:
            self._upgraded.on_finished()
        elif self._body is not None and self._body.ends_with_connection:
            self._complete()
        elif self._request is not None:
            self._cut("the local server closed the connection without a complete response")
        else:
            self._settle("")
            self.leave()

    def reset(self, reason: str) -> None:
        """See `End.reset`: the relay cuts this visitor, or there is no connection to the hidden server for it."""
        if not self.closed:
            self._cut(reason or "reset")
            self._discard()

    def release(self) -> None:
        """See `End.release`."""
        self.finish()
        self._discard()
        if self._upgraded is not None:
            self._settle("")

    def unacknowledged(self) -> int:
        """See `End.unacknowledged`."""
        return 0 if self._left else self._visitor.unacknowledged()

    @property
    def tcp_connection(self) -> TcpSocket | None:
        """See `End.tcp_connection`: while a visitor reads responses, it may vanish."""
        return None if self._left or self.closed else self._visitor.tcp_connection

    def _consumed(self, count: int) -> None:
        self.was_relayed = True
        if self._waits and not self.buffered and not self._left:
            self._waits = False
            (self._upgraded or self._connection).on_requests_taken()

    def _discard(self) -> None:
        super()._discard()
        if self.listed_in is not None:
            self.listed_in.discard(self)
            self.listed_in = None

    # Not inside of a call of the relay, which does not expect one from here meanwhile

    def _feed_eof(self) -> None:
        if not self.closed and not self.eof_received:
            self.feed_eof()

    def _break(self, reason: str) -> None:
        if not self.closed:
            self._notify_broken(ConnectionResetError(errno.ECONNRESET, reason))

    # Responses

    def _write_head(self, data: memoryview) -> int:
        """Take bytes of a response head, and what is behind it of the body; return how many."""
        request = self._request
        if request is None:
            self._cut("the local server sent bytes without being asked")
            return len(data)
        try:
            taken, response = self._reader.take(data, request, self._connection.max_head)
        except HeadError as error:
            self._cut(f"the response of the local server is malformed: {error}")
            return len(data)
        if response is None:
            return taken
        status, length = response.status, response.body_length
        if status < 200 and status != 101:
            self.continued |= status == 100
            self._connection.on_response_head(response, NOTHING)
            return taken
        self.response_started = True
        if not response.keep_alive:
            self.is_reusable = False
        if length is None or response.until_close or length > len(data) - taken:
            return taken + self._begin_body(response, data[taken:])
        end = taken + length
        self._connection.on_response_head(response, data[taken:end])
        if self._upgraded is None:
            self._complete()
        return end

    def _begin_body(self, response: ResponseHead, data: memoryview) -> int:
        """A response goes on behind `data`, which came with its head; or it may."""
        self._body = body = Body(response.body_length, until_close=response.until_close)
        try:
            taken, out = body.take(data)
        except HeadError as error:
            self._cut(f"the response of the local server is malformed: {error}")
            return len(data)
        self._connection.on_response_head(response, out)
        if body.is_over:
            self._complete()
        return taken

    def _write_body(self, data: memoryview) -> int:
        body = self._body
        assert body is not None
        try:
            taken, out = body.take(data)
        except HeadError as error:
            self._cut(f"the response of the local server is malformed: {error}")
            return len(data)
        if len(out):
            self._connection.on_response_data(out)
        if body.is_over:
            self._complete()
        return taken

    def _complete(self) -> None:
        self._body = self._request = None
        self.responses += 1
        self._connection.on_response_complete()

    def _cut(self, reason: str) -> None:
        """Cut both sides."""
        left = self._left
        self.abandon(reason)
        if not left:
            (self._upgraded or self._connection).on_stream_over(reason)

    def _settle(self, reason: str) -> None:
        """The stream is over, and nothing is missing."""
        if not self._left:
            self._left = True
            (self._upgraded or self._connection).on_stream_over(reason)
