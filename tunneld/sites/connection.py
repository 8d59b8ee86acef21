"""A visitor's HTTP connection to a shared port: each request goes to the tunnel that has its name.

    visitor's end ──► RequestInput ──► HttpConnection ──► RequestStream ──► relay ──► hidden server
                  ◄─────────────────                  ◄──               ◄──       ◄──

A tunnel sees a `RequestStream` as it sees any visitor: an end, to be relayed to a connection of the hidden server. So
everything that holds for relays (limits, throttling, quota, resets, counting) holds for requests, and no tunnel knows
HTTP.

Requests are routed one by one, connections never: a proxy in front of the relay may send requests of many visitors, and
for many names, through one connection. A stream lives as long as the requests of the connection go to the same place,
and is never shared between visitors: no response can reach another visitor than the one that asked.

What the next side does not take stops the sender. There is no task; all of it runs in callbacks of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tunneld.engine.tls_end import TlsEnd
from tunneld.net.endpoint import Peer
from tunneld.policy.limits import HttpLimits
from tunneld.sites.access_log import AccessLog
from tunneld.sites.deadline import Deadline
from tunneld.sites.end_owner import EndOwner, log
from tunneld.sites.endings import ClosingConnection, UpgradedConnection
from tunneld.sites.fields import Origin, Passage
from tunneld.sites.heads import HeadWriter
from tunneld.sites.input import RequestInput
from tunneld.sites.pages import error_page
from tunneld.sites.site import Request, Site, Verdict
from tunneld.sites.stream import RequestStream
from tunneld.wire.http1 import HeadError, RequestHead, ResponseHead

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe


class HttpConnection(EndOwner):
    """The handler of a visitor's end, the receiver of its requests, and of the responses to them. It owns the end."""

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
        self.max_head = limits.max_head
        super().__init__(end, access_log)
        self._engine = end.engine
        self._origin = origin
        self._is_tls = origin.scheme == b"https"
        self._find = find
        self._limits = limits
        self._on_over = on_over
        self._deadline = Deadline(end.engine, self._on_deadline)
        self._input = RequestInput(end, limits.max_head, self)
        self._writer = HeadWriter(origin)
        self._request: Request | None = None  # under way
        self._passage: Passage | None = None  # how its site changes it
        self._awaits_verdict = False  # whether it may pass
        self._site: Site | None = None
        self._client: Peer | None = None  # the visitor of the current route; behind a proxy they change
        self._stream: RequestStream | None = None  # of the current route
        self._examines = False  # the site is deciding about a request, and has not returned

    def start(self) -> None:
        """Serve the connection from now on."""
        self._end.handler = self
        self._deadline.set(self._limits.head_timeout)
        if not self.start_end():
            return
        self._input.resume()  # bytes may have come with the end of the handshake
        if self._end.eof_received and not self._end.buffered and not self._is_over:
            self.on_eof()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way, or begun, and the visitor has read the last response."""
        is_waiting = self._request is None and self._input.is_empty and not self._is_over
        return is_waiting and self._end.send_capacity() > 0

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self.is_idle:
            self.on_over("")
            self._end.close()

    # The handler of the visitor's end

    def on_data(self, data: memoryview) -> int:
        """See `RequestInput.take`."""
        return self._input.take(data)

    def on_writable(self) -> None:
        """The visitor takes bytes again, so the stream does."""
        self._input.on_visitor_reads()
        if self._stream is not None:
            self._stream.notify_writable()

    def on_eof(self) -> None:
        """The visitor sends no more. A complete request is still answered."""
        self._input.end()

    def _on_deadline(self) -> None:
        """A timeout of `HttpLimits`."""
        if self._request is not None:
            timeout = self._limits.response_timeout
            self._fail_request(504, f"no response within {timeout:g} s (names.response_timeout)")
        elif self._input.is_empty:
            self._finish()
        else:
            self._refuse(408)

    # The receiver of requests

    def on_head_begun(self) -> None:
        """See `RequestReceiver.on_head_begun`."""
        self._deadline.set(self._limits.head_timeout)

    def on_request(self, head: RequestHead) -> None:
        """See `RequestReceiver.on_request`: route it."""
        keep_alive = head.keep_alive and not self._input.is_last
        origin, identity = self._origin, self._writer.identity(head)
        if origin.proxies is None:
            self._request = request = Request(head, self._is_tls, origin.peer, identity, keep_alive)
        else:
            self._request = request = Request(head, origin.is_secure(head), origin.client(head), identity, keep_alive)
        self._deadline.set(self._limits.response_timeout)
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

    def takes_body(self) -> bool:
        """See `RequestReceiver.takes_body`."""
        return self._stream is not None and not self._stream.buffered and not self._awaits_verdict

    def on_body(self, data: bytes | bytearray | memoryview) -> None:
        """See `RequestReceiver.on_body`."""
        assert self._stream is not None
        if self._record is not None:
            self._record.up += len(data)
        self._stream.feed_requests(memoryview(data))

    def takes_pipe(self) -> bool:
        """See `RequestReceiver.takes_pipe`."""
        return self.takes_body() and self._stream is not None and self._stream.takes_pipe

    def on_body_pipe(self, pipe: Pipe) -> bool:
        """See `RequestReceiver.on_body_pipe`."""
        assert self._stream is not None
        if self._record is not None:
            self._record.up += pipe.count
        return self._stream.feed_pipe(pipe)

    def on_refused(self, error: HeadError) -> None:
        """See `RequestReceiver.on_refused`."""
        log.debug("request refused", peer=self._origin.address, reason=str(error))
        self._refuse(error.status)

    def on_last(self, *, broken_off: bool) -> None:
        """See `RequestReceiver.on_last`."""
        if broken_off:
            self.drop("the visitor ended in the middle of a request")
        else:
            self._finish()

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
            self._engine.call_after_batch(self._input.resume)

    def _send_to(self, site: Site, request: Request) -> None:
        """Send the head to its site, through the stream that is open for it or a new one."""
        if site is not self._site or request.client != self._client:
            self._leave_stream()
            self._site, self._client = site, request.client
        if self._record is not None:
            self._record.tunnel = site.tunnel
        if self._stream is None:
            self._open_stream(site, request.client)
        if (stream := self._stream) is not None:  # unless it has failed at once
            head = request.head
            stream.send_request(head, self._writer.request(head, request.identity, site.rewrite, self._passage))

    def _open_stream(self, site: Site, client: Peer) -> None:
        """Not a part of `_send_to`: mypyc would assume there that the stream is still set after `open`."""
        self._stream = stream = RequestStream(self._end, self)
        site.open(stream, client, self._origin)

    # The receiver of responses

    def on_requests_taken(self) -> None:
        """See `ResponseReceiver.on_requests_taken`."""
        if self._request is not None:
            self._input.resume()

    def on_response_head(self, response: ResponseHead, data: bytes | bytearray | memoryview) -> None:
        """See `ResponseReceiver.on_response_head`."""
        request, site, stream = self._request, self._site, self._stream
        assert request is not None
        assert site is not None
        assert stream is not None
        if response.is_interim and request.head.minor_version == 0:
            return  # HTTP/1.0 has none
        is_interim = response.is_interim
        keep_alive = request.keep_alive and not response.until_close and not self._input.is_last
        if not is_interim:
            if request.head.expects_continue and self._input.awaits_body and not stream.continued:
                keep_alive = False  # the visitor may send the body, or leave it out (RFC 9110 §10.1.1)
            stream.keeps_visitor = keep_alive
            if self._record is not None:
                self._record.status = response.status
                self._record.down += len(data)
            if self._limits.response_timeout:
                self._deadline.set(0)
        head = self._writer.response(
            response, request.head, request.identity, site.rewrite, self._passage, keep_alive=keep_alive
        )
        self._end.send(head + data if data else head)  # together: one TLS record
        if response.status == 101:
            UpgradedConnection(self._end, stream, self, self._record).start(self._input.stop())

    def on_response_data(self, data: bytes | bytearray | memoryview) -> None:
        """See `ResponseReceiver.on_response_data`."""
        if self._record is not None:
            self._record.down += len(data)
        self._end.write(memoryview(data))

    def on_response_complete(self) -> None:
        """See `ResponseReceiver.on_response_complete`."""
        stream = self._stream
        assert stream is not None
        if self._input.awaits_body or not stream.keeps_visitor:
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
        elif stream.may_repeat(request.head):
            self._send_to(site, request)  # the hidden server had closed the connection, just as the request was sent
        else:
            self._fail_request(stream.failure_status, reason)

    # How requests and the connection end

    def _respond(self, response: bytes) -> None:
        """Answer the request with the relay's own response."""
        request = self._request
        if self._record is not None:
            self._record.status = int(response[9:12])
        self._end.send(response)
        if request is not None and request.keep_alive and not self._input.awaits_body:
            self._await_request()
        else:
            self._finish()

    def _fail_request(self, status: int, reason: str) -> None:
        """Answer with an error page, because of the hidden server."""
        request, site = self._request, self._site
        assert request is not None
        if site is not None and not self._awaits_verdict:
            site.on_failed(reason)
        self._leave_stream(reason or "failed")
        keep_alive = request.keep_alive and not self._input.awaits_body
        self._respond(error_page(status, request.head, request.identity, keep_alive=keep_alive))

    def _refuse(self, status: int) -> None:
        """Answer what cannot be read, and close: nothing behind it can be read either."""
        if self._request is not None and self._stream is not None and self._stream.response_started:
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
        self.end_record()
        if self._input.is_last:
            self._finish()
            return
        if self._input.next_request():
            self._deadline.set(self._limits.keep_alive_timeout)
        else:
            self._deadline.set(self._limits.head_timeout)
            self._input.resume_later()  # not inside of what the stream is doing

    def _leave_stream(self, failure: str = "") -> None:
        """Part from the stream; with a `failure`, its exchange is not complete, and it is cut."""
        stream, self._stream = self._stream, None
        if stream is not None and failure:
            stream.abandon(failure)
        elif stream is not None:
            stream.leave()

    def _finish(self) -> None:
        """Close the connection behind what was sent to the visitor."""
        self._leave_stream("the request was not completed" if self._input.awaits_body else "")
        self.end_record()
        self._deadline.stop()
        self._input.stop()
        ClosingConnection(self._end, self).start(visitor_ended=self._input.ended)

    def on_over(self, reason: str) -> None:
        """The visitor's end is closed, or about to be."""
        if self._is_over:
            return
        self._is_over = True
        self.end_record()
        self._deadline.close()
        self._input.stop()
        self._leave_stream("" if self._request is None else reason)
        self._on_over(self)
