"""A visitor's HTTP connection to a shared port: each request goes to the tunnel that has its name.

    visitor's end ──► HttpConnection ──► RequestStream ──► relay ──► hidden server       one stream for each route
                  ◄──   responses    ◄──               ◄──       ◄──

A tunnel sees a `RequestStream` as it sees any visitor: an end, to be relayed to a connection of the hidden server. So
everything that holds for relays (limits, throttling, quota, resets, counting) holds for requests, and no tunnel knows
HTTP.

Requests are routed one by one, connections never: a proxy in front of the relay may send requests of many visitors, and
for many names, through one connection. One request is under way at a time; a pipelined one waits in the buffer. A
stream lives as long as the requests of the connection go to the same place, and is never shared between visitors: no
response can reach another visitor than the one that asked.

Nothing is held but heads. A body goes on as it comes, and what the next side does not take stops the sender. The
connection has no task; it runs in callbacks of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import structlog

from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import reason_of
from tunneld.net.endpoint import Peer
from tunneld.policy.limits import HttpLimits
from tunneld.sites.access import REFUSAL_STATUSES
from tunneld.sites.access_log import AccessLog, AccessRecord
from tunneld.sites.body import Body
from tunneld.sites.endings import ClosingConnection, UpgradedConnection
from tunneld.sites.fields import Origin, request_fields, request_id, response_fields
from tunneld.sites.pages import error_page
from tunneld.sites.site import Passage, Request, Site, Verdict
from tunneld.sites.stream import RequestStream
from tunneld.wire.http1 import (
    HeadError,
    ResponseHead,
    encode_request,
    encode_response,
    find_head,
    parse_request,
    skip_empty_lines,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))
"""Methods of requests that may be sent twice (RFC 9110 §9.2.2)."""


class HttpConnection:
    """The handler of a visitor's end, and the receiver of its responses. It owns the end."""

    def __init__(
        self,
        end: TlsEnd,
        origin: Origin,
        find: Callable[[Request], Site | bytes],
        limits: HttpLimits,
        on_over: Callable[[HttpConnection], None],
        access_log: AccessLog | None = None,
    ) -> None:
        """`find` returns where a request goes, or the relay's own response if it goes nowhere. `on_over` is called
        once, when the connection is closed.
        """
        self.deadline = 0.0
        self.max_head = limits.max_head
        self._end = end
        self._engine = end.engine
        self._origin = origin
        self._find = find
        self._limits = limits
        self._on_over = on_over
        self._access_log = access_log  # None: requests are not logged
        self._record: AccessRecord | None = None  # of the request under way
        self._input = bytearray()  # taken from the end and not used: incomplete heads, and what came behind heads
        self._request: Request | None = None  # under way; None: a head is awaited
        self._body: Body | None = None  # of that request, unless it is complete
        self._site: Site | None = None
        self._passage: Passage | None = None  # how the site changes that request
        self._awaits_verdict = False  # whether it may pass
        self._client: Peer | None = None  # the visitor of the current route; behind a proxy they change
        self._stream: RequestStream | None = None  # of the current route
        self._examines = False  # the site is deciding about a request, and has not returned
        self._visitor_ended = False
        self._is_over = False

    def start(self) -> None:
        """Serve the connection from now on."""
        self._end.handler = self
        self._set_deadline(self._limits.head_timeout)
        try:
            self._end.start()
        except OSError as error:
            self.drop(reason_of(error))
            return
        self._resume()  # bytes may have come with the end of the handshake
        if self._end.eof_received and not self._end.buffered and not self._is_over:
            self.on_eof()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way, or begun."""
        return self._request is None and not self._input

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self.is_idle:
            self._close()

    def drop(self, reason: str) -> None:
        """Cut the connection now."""
        if not self._is_over:
            self.on_over(reason)
            self._end.reset(reason)

    # The handler of the visitor's end

    def on_data(self, data: memoryview) -> int:
        """Take a head whole, and a body as far as the stream takes it."""
        if self._request is not None:
            return 0 if self._input else self._pass_on(data)
        taken = min(len(data), self.max_head + 4 - len(self._input))
        self._input += data[:taken]
        self._use_input()
        return taken

    def on_writable(self) -> None:
        """The visitor takes bytes again, so the stream does."""
        if self._stream is not None:
            self._stream.notify_writable()

    def on_eof(self) -> None:
        """The visitor sends no more. A complete request is still answered."""
        self._visitor_ended = True
        if self._request is None:
            self._close()
        elif self._body is not None:
            self.drop("the visitor ended in the middle of a request")

    def on_write_failed(self, error: OSError) -> None:
        """The visitor reads no more."""
        self.drop(reason_of(error))

    def on_reset(self, error: OSError) -> None:
        """The visitor is gone."""
        self.drop(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug in here."""
        log.error("http connection failed: internal error", exc_info=error)
        self.drop("internal error")

    def on_deadline(self) -> None:
        """A timeout of `HttpLimits`."""
        if self._request is not None:
            timeout = self._limits.response_timeout
            self._fail_request(504, f"no response within {timeout:g} s (names.response_timeout)")
        elif self._input:
            self._refuse(408)
        else:
            self._close()

    # Requests

    def _use_input(self) -> None:
        """Go on with what was taken from the visitor."""
        while self._input and self._end.handler is self:
            if self._request is None:
                if not self._read_head():
                    return
            else:
                data = bytes(self._input)
                taken = self._pass_on(memoryview(data))
                del self._input[:taken]
                if not taken and self._request is not None:
                    return

    def _resume(self) -> None:
        """The stream takes bytes again, or the next request may come."""
        self._use_input()
        end = self._end
        while end.buffered and not self._input and end.handler is self:
            taken = self.on_data(memoryview(bytes(end.buffered)))
            if not taken:
                return
            end.consume(taken)

    def _read_head(self) -> bool:
        """Read the head of a request and route it. False: it is not complete, or the connection ends."""
        del self._input[: skip_empty_lines(self._input)]
        try:
            size = find_head(self._input, self.max_head)
            if not size:
                return False
            head = parse_request(bytes(self._input[:size]))
        except HeadError as error:
            log.debug("request refused", peer=self._origin.address, reason=str(error))
            self._refuse(error.status)
            return False
        del self._input[:size]
        keep_alive = head.keep_alive and not self._visitor_ended
        origin = self._origin
        request = Request(head, origin.is_secure(head), origin.client(head), request_id(head), keep_alive)
        self._request = request
        self._body = Body(head.body_length) if head.body_length != 0 else None
        self._set_deadline(self._limits.response_timeout)
        if self._access_log is not None:
            self._record = self._access_log.begin(origin, request)
        found = self._find(request)
        self._awaits_verdict = not isinstance(found, bytes)
        if isinstance(found, bytes):
            self._respond(found)
        else:
            self._examines = True
            found.examine(request, partial(self._on_verdict, found, request))
            self._examines = False
        return True

    def _on_verdict(self, site: Site, request: Request, verdict: Verdict) -> None:
        """A site has decided whether the request may pass."""
        if self._request is not request or self._is_over:
            return
        self._awaits_verdict = False
        if isinstance(verdict, bytes):
            self._respond(verdict)
        else:
            self._passage = verdict
            self._send_to(site, request)
        if not self._examines:  # a late verdict
            self._engine.call_after_batch(self._resume)

    def _send_to(self, site: Site, request: Request) -> None:
        """Send the head to its site, through the stream that is open for it or a new one."""
        if site is not self._site or request.client != self._client:
            self._leave_stream()
            self._site, self._client = site, request.client
        if self._record is not None:
            self._record.tunnel = site.tunnel
        if self._stream is None:
            self._stream = RequestStream(self._engine, self)
            site.open(self._stream, request.client, self._origin)
        if (stream := self._stream) is not None:  # unless it has failed at once
            fields = request_fields(request.head, self._origin, request.identity, site.rewrite)
            if self._passage is not None:
                fields = self._passage.of_request(fields)
            stream.expect_response(request.head)
            stream.feed_requests(memoryview(encode_request(request.head, fields)))

    def _pass_on(self, data: memoryview) -> int:
        """Pass on bytes of a body; return how many were taken."""
        stream, body = self._stream, self._body
        if stream is None or body is None or stream.buffered or self._awaits_verdict:
            return 0
        try:
            taken, out = body.take(data)
        except HeadError as error:
            log.debug("request refused", peer=self._origin.address, reason=str(error))
            self._refuse(error.status)
            return len(data)
        if body.is_over:
            self._body = None
        if len(out):
            stream.feed_requests(memoryview(out))
        if self._record is not None:
            self._record.up += len(out)
        return taken

    # The receiver of responses

    def send_capacity(self) -> int:
        """See `ResponseReceiver.send_capacity`."""
        return self._end.send_capacity()

    def unacknowledged(self) -> int:
        """See `ResponseReceiver.unacknowledged`."""
        return self._end.unacknowledged()

    def on_requests_taken(self) -> None:
        """See `ResponseReceiver.on_requests_taken`."""
        if self._request is not None:
            self._resume()

    def on_response_head(self, response: ResponseHead) -> None:
        """See `ResponseReceiver.on_response_head`."""
        request, site, stream = self._request, self._site, self._stream
        assert request is not None
        assert site is not None
        assert stream is not None
        fields = response_fields(response, request.head, self._origin, site.rewrite)
        keep_alive = request.keep_alive and not response.until_close and not self._visitor_ended
        if not response.is_interim:
            if self._passage is not None:
                fields = self._passage.of_response(fields)
            fields.append((b"X-Request-Id", request.identity))
            stream.keeps_visitor = keep_alive
            if self._record is not None:
                self._record.status = response.status
            self._set_deadline(0)
        self._end.send(encode_response(response, fields, request.head, keep_alive=keep_alive))
        if response.status == 101:
            UpgradedConnection(self._end, stream, self, self._record).start(bytes(self._input))

    def on_response_data(self, data: bytes | bytearray | memoryview) -> None:
        """See `ResponseReceiver.on_response_data`."""
        if self._record is not None:
            self._record.down += len(data)
        self._end.write(memoryview(data))

    def on_response_complete(self) -> None:
        """See `ResponseReceiver.on_response_complete`."""
        stream = self._stream
        assert stream is not None
        if self._body is not None or not stream.keeps_visitor:
            self._finish()
            return
        if not stream.is_reusable:
            self._leave_stream()
        self._await_request()

    def on_stream_over(self, reason: str) -> None:
        """See `ResponseReceiver.on_stream_over`."""
        stream, self._stream = self._stream, None
        request, site = self._request, self._site
        if stream is None or request is None or site is None or self._awaits_verdict:
            return
        if stream.response_started:
            self.drop(reason)
        elif stream.responses and request.head.body_length == 0 and request.head.method in IDEMPOTENT:
            self._send_to(site, request)  # the hidden server had closed the connection, just as the request was sent
        else:
            refusal = stream.refusal
            status = 502 if stream.was_relayed else REFUSAL_STATUSES.get(refusal.kind, 503) if refusal else 503
            self._fail_request(status, reason)

    # How requests and the connection end

    def _respond(self, response: bytes) -> None:
        """Answer the request with the relay's own response."""
        request = self._request
        if self._record is not None:
            self._record.status = int(response[9:12])
        self._end.send(response)
        if request is not None and request.keep_alive and self._body is None:
            self._await_request()
        else:
            self._finish()

    def _fail_request(self, status: int, reason: str) -> None:
        """Answer with an error page, because of the hidden server."""
        request, site = self._request, self._site
        assert request is not None
        if site is not None and not self._awaits_verdict:
            site.on_failed(reason)
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abandon(reason)
        keep_alive = request.keep_alive and self._body is None
        self._respond(error_page(status, request.head, request.identity, keep_alive=keep_alive))

    def _refuse(self, status: int) -> None:
        """Answer what cannot be read, and close: nothing behind it can be read either."""
        if self._stream is not None and self._stream.response_started:
            self.drop("malformed request")
            return
        identity = self._request.identity if self._request is not None else b"-"
        if self._access_log is not None:
            self._record = self._record or self._access_log.begin(self._origin, None)
            self._record.status = status
        self._end.send(error_page(status, None, identity))
        self._finish()

    def _await_request(self) -> None:
        self._request = None
        self._end_record()
        if self._visitor_ended:
            self._close()
            return
        pending = bool(self._input or self._end.buffered)
        self._set_deadline(self._limits.head_timeout if pending else self._limits.keep_alive_timeout)
        if pending:
            self._engine.call_after_batch(self._resume)  # not inside of what the stream is doing

    def _leave_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.leave()

    def _finish(self) -> None:
        """Close the connection behind what was sent to the visitor."""
        stream, self._stream = self._stream, None
        if stream is not None and self._body is None:
            stream.leave()
        elif stream is not None:
            stream.abandon("the request was not completed")
        self._end_record()
        self._set_deadline(0)
        self._input.clear()
        ClosingConnection(self._end, self).start(visitor_ended=self._visitor_ended)

    def _close(self) -> None:
        """Close the connection between two requests."""
        if not self._is_over:
            self.on_over("")
            self._end.close()

    def on_over(self, reason: str) -> None:
        """The visitor's end is closed, or about to be."""
        if self._is_over:
            return
        self._is_over = True
        self._end_record()
        self._set_deadline(0)
        stream, self._stream = self._stream, None
        if stream is not None and self._request is None:
            stream.leave()
        elif stream is not None:
            stream.abandon(reason)
        self._on_over(self)

    def _end_record(self) -> None:
        """The request under way is over, for the access log."""
        if self._record is not None and self._access_log is not None:
            self._access_log.end(self._record)
            self._record = None

    def _set_deadline(self, seconds: float) -> None:
        """Call `on_deadline` in this many seconds; 0: never."""
        self._engine.timers.forget(self)
        if seconds:
            self.deadline = self._engine.now() + seconds
            self._engine.timers.watch(self)
