"""One connection, as it is looked at: requests on one side, responses on the other, in the same order.

request side   ──► a new exchange, waits ──┐
response side  ──► its response  ◄─────────┘ ──► done             101: the rest is another protocol
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final

from tunneld.errors import RemoteProtocolError
from tunneld.inspector.framing import CHUNKED, RAW, UNTIL_END, MessageReader, NotHttpError
from tunneld.inspector.records import FRAME_COST, Exchange, Headers, SeenFrame, SeenMessage, SeenRequest, SeenResponse
from tunneld.inspector.records import cost_of as cost_of_headers
from tunneld.inspector.store import ExchangeStore
from tunneld.inspector.websocket import Inflater, WebSocketReader, keeps_context
from tunneld.wire.proxy_protocol import missing_v2

REQUEST, RESPONSE = 0, 1
"""The two sides."""
MAX_WAITING: Final = 100
"""Requests of one connection that wait for their responses. Browsers do not pipeline; tools send some ten."""
SPEAKS_FIRST = "not HTTP: the local server speaks first"
TLS_INSIDE = (
    "TLS between the visitor and the local server: this agent cannot read it. Expose the local server's plain HTTP "
    "port, or let TLS end at the relay (--host) or here (--https-here)"
)

_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}(?: .*)?", re.DOTALL)
_REQUEST_LINE = re.compile(r"(\S{1,32}) +(.*?) +HTTP/(1\.[0-9])\s*")
_STATUS_LINE = re.compile(r"HTTP/(1\.[0-9]) +([1-9][0-9]{2})(?: (.*))?")
_NO_BODY = frozenset({204, 304})


class Conversation:
    """Reads one connection, and keeps what it finds in the store. `feed` and the like raise `NotHttpError` once it
    cannot be followed; then call `give_up`.
    """

    def __init__(
        self,
        store: ExchangeStore,
        exposure: str,
        visitor: str,
        *,
        has_proxy_header: bool = False,
        replay_of: int | None = None,
    ) -> None:
        """`has_proxy_header`: the visitor's bytes begin with a PROXY header, version 2."""
        self.store = store
        self.exposure = exposure
        self.visitor = visitor
        self.replay_of = replay_of
        self.now = 0.0
        self.waiting: deque[Exchange] = deque()  # their responses have not begun
        self.switched: Exchange | None = None  # its upgrade was accepted
        self._inflaters = 0
        self._proxy_header: bytes | None = b"" if has_proxy_header else None
        self._is_http = False  # a head has been read
        self._requests, self._responses = RequestSide(self), ResponseSide(self)
        self._readers = MessageReader(self._requests), MessageReader(self._responses)

    def feed(self, side: int, data: bytes, now: float) -> None:
        """Bytes have passed. Raises `NotHttpError`."""
        self.now = now
        if side == REQUEST and self._proxy_header is not None:
            data = self._behind_proxy_header(data)
        if side == RESPONSE and not self.waiting and self._responses.exchange is None and self.switched is None:
            raise NotHttpError("a response without a request" if self._is_http else SPEAKS_FIRST)
        self._readers[side].feed(data)

    def skip(self, side: int, count: int, now: float) -> None:
        """Bytes have passed, which were not copied. Raises `NotHttpError`."""
        self.now = now
        self._readers[side].skip(count)

    def spare(self, side: int) -> int:
        """Bytes from here on that need not be copied."""
        return (self._requests, self._responses)[side].spare(self._readers[side].spare)

    def end(self, now: float) -> None:
        """The connection has ended."""
        self.now = now
        self._release()
        if self._readers[RESPONSE].ends_with_connection:
            self._responses.on_message_end([])
        for exchange in {*self.waiting, self._requests.exchange, self._responses.exchange, self.switched}:
            if exchange is not None and exchange.ended is None:
                note = "" if exchange.upgrade else "the connection ended first"
                self.finish(exchange, exchange.note or note)

    def give_up(self, reason: str, now: float) -> None:
        """The connection cannot be followed; it goes on unseen."""
        self.now = now
        self._release()
        open_ones = {*self.waiting, self._requests.exchange, self._responses.exchange, self.switched} - {None}
        if not open_ones and not self._is_http:
            open_ones = {self.store.new(self.exposure, self.visitor, now, self.replay_of)}
        for exchange in open_ones:
            if exchange is not None:
                self.finish(exchange, reason)

    def finish(self, exchange: Exchange, note: str = "") -> None:
        """An exchange has ended."""
        exchange.ended, exchange.note = self.now, note or exchange.note
        self.store.changed(exchange)

    def begin(self, request: SeenRequest) -> Exchange:
        """A request has begun."""
        if len(self.waiting) >= MAX_WAITING:
            raise NotHttpError(f"more than {MAX_WAITING} requests wait for their responses")
        self._is_http = True
        exchange = self.store.new(self.exposure, self.visitor, self.now, self.replay_of)
        exchange.request = request
        self.waiting.append(exchange)
        return exchange

    def switch(self, exchange: Exchange, *, accepted: bool) -> None:
        """A request for an upgrade was answered."""
        if accepted:
            self.switched = exchange
            for side, sink in ((REQUEST, self._requests), (RESPONSE, self._responses)):
                sink.begin_raw(exchange, side)
        self._readers[REQUEST].resume(RAW if accepted else 0)

    def end_message(self, exchange: Exchange) -> None:
        """A message is complete: perhaps the exchange is."""
        request, response = exchange.request, exchange.response
        if request and response and request.ended and response.ended and exchange is not self.switched:
            self.finish(exchange)
        else:
            self.store.changed(exchange)

    def add_frame(self, exchange: Exchange, frame: SeenFrame) -> None:
        """A frame of a WebSocket has passed."""
        limits, frames = self.store.limits, exchange.frames
        exchange.frames_seen += 1
        self.store.changed(exchange)
        if not exchange.is_kept:
            return
        frames.append(frame)
        before, exchange.frame_bytes = exchange.frame_bytes, exchange.frame_bytes + len(frame.data) + FRAME_COST
        while len(frames) > limits.frames or exchange.frame_bytes > 2 * limits.body + FRAME_COST * limits.frames:
            exchange.frame_bytes -= len(frames.popleft().data) + FRAME_COST
        self.store.charge(exchange, exchange.frame_bytes - before)

    def new_inflater(self, extensions: str, side: int) -> Inflater | None:
        """What decompresses a side of a WebSocket; None if it is not compressed, or there are too many."""
        store, keeps = self.store, keeps_context(extensions, ("client", "server")[side])
        if keeps is None or store.inflaters >= store.limits.inflaters:
            return None
        store.inflaters += 1
        self._inflaters += 1
        return Inflater(store.limits.body, keeps_context=keeps)

    def _release(self) -> None:
        self.store.inflaters -= self._inflaters
        self._inflaters = 0

    def _behind_proxy_header(self, data: bytes) -> bytes:
        assert self._proxy_header is not None
        data, at = self._proxy_header + data, 0
        try:
            while missing := missing_v2(data[:at]) if at else 16:
                if at + missing > len(data):
                    self._proxy_header = data
                    return b""
                at += missing
        except RemoteProtocolError:
            at = 0  # there is none
        self._proxy_header = None
        return data[at:]


class SeenSide:
    """What both sides have in common: a `MessageSink` that keeps what its reader finds."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.exchange: Exchange | None = None  # of the message that is passing
        self.message: SeenMessage | None = None
        self._raw: WebSocketReader | None = None

    def begin_raw(self, exchange: Exchange, side: int) -> None:
        """The exchange has changed to another protocol."""
        self.exchange = exchange
        self.message = (exchange.request, exchange.response)[side]
        if exchange.upgrade != "websocket" or exchange.response is None:
            return
        inflater = self.conversation.new_inflater(exchange.response.header("sec-websocket-extensions"), side)
        limit = self.conversation.store.limits.body
        self._raw = WebSocketReader(self._on_frame, inflater, limit, is_request=side == REQUEST)

    def spare(self, of_reader: int) -> int:
        """Bytes that need not be copied; `of_reader` are body."""
        if self._raw is not None:
            return self._raw.spare
        message = self.message
        return of_reader if message is not None and len(message.body) >= self.conversation.store.limits.body else 0

    # A `MessageSink`

    def on_body(self, data: memoryview) -> None:
        """See `MessageSink`."""
        exchange, message, store = self.exchange, self.message, self.conversation.store
        if exchange is None or message is None:
            return
        kept = data[: max(0, store.limits.body - len(message.body))]
        message.size += len(data)
        if kept and exchange.is_kept and not message.lost:
            message.body += kept
            store.charge(exchange, len(kept))
        store.changed(exchange)

    def on_missing(self, count: int) -> None:
        """See `MessageSink`."""
        if self.exchange is None or self.message is None:
            return
        self.message.size += count
        if len(self.message.body) < self.conversation.store.limits.body:
            self.message.lost += count
            self.exchange.note = "the inspector fell behind: a part of the body is missing"
        self.conversation.store.changed(self.exchange)

    def on_raw(self, data: memoryview) -> None:
        """See `MessageSink`."""
        if self.message is not None and self.exchange is not None:
            self.message.size += len(data)
            if self._raw is not None:
                self._raw.feed(data, self.conversation.now)
            self.conversation.store.changed(self.exchange)

    def on_raw_missing(self, count: int) -> None:
        """See `MessageSink`."""
        if self.message is not None:
            self.message.size += count
        if self._raw is not None:
            self._raw.skip(count, self.conversation.now)

    def _on_frame(self, frame: SeenFrame) -> None:
        if self.exchange is not None:
            self.conversation.add_frame(self.exchange, frame)

    def _end(self, trailers: Headers) -> None:
        exchange, message = self.exchange, self.message
        self.exchange = self.message = None
        if exchange is not None and message is not None:
            message.trailers, message.ended = trailers, self.conversation.now
            self.conversation.store.charge(exchange, cost_of_headers(trailers))
            self.conversation.end_message(exchange)


class RequestSide(SeenSide):
    """The visitor's side."""

    def check(self, start: bytes) -> None:
        """See `MessageSink`."""
        if start[:1] == b"\x16":
            raise NotHttpError(TLS_INSIDE)
        if not _METHOD.fullmatch(start.partition(b"\n")[0]):
            raise NotHttpError("not HTTP: it does not begin with a request")

    def on_head(self, start: str, headers: Headers) -> int:
        """See `MessageSink`."""
        found = _REQUEST_LINE.fullmatch(start)
        if found is None:
            raise NotHttpError("not HTTP/1.1: " + ("HTTP/2" if start.startswith("PRI ") else "no request line"))
        conversation = self.conversation
        method, target, version = found.groups()
        self.message = SeenRequest(version, headers, conversation.now, method=method, target=target)
        self.exchange = conversation.begin(self.message)
        conversation.store.charge(self.exchange, cost_of_headers(headers) + len(target))
        if upgrade := self.message.header("upgrade"):
            self.exchange.upgrade = upgrade.lower()
        return CHUNKED if _is_chunked(self.message) else _length(self.message)

    def on_message_end(self, trailers: Headers) -> bool:
        """See `MessageSink`."""
        request, exchange = self.message, self.exchange
        self._end(trailers)
        assert isinstance(request, SeenRequest)
        asks = bool(exchange and exchange.upgrade) or request.method == "CONNECT"
        return asks and exchange in self.conversation.waiting  # else it was answered already


class ResponseSide(SeenSide):
    """The local server's side."""

    def check(self, start: bytes) -> None:
        """See `MessageSink`."""
        if not start.startswith(b"HTTP/"[: len(start)]):
            raise NotHttpError("not HTTP: the local server does not answer with a response")

    def on_head(self, start: str, headers: Headers) -> int:
        """See `MessageSink`."""
        conversation, found = self.conversation, _STATUS_LINE.fullmatch(start)
        if found is None or not conversation.waiting:
            raise NotHttpError("not HTTP/1.1: no status line")
        version, status, reason = found[1], int(found[2]), found[3] or ""
        exchange = conversation.waiting[0]
        conversation.store.charge(exchange, cost_of_headers(headers))
        if status < 200 and status != 101:
            if len(exchange.interim) < MAX_WAITING:
                exchange.interim.append(status)
            return 0
        conversation.waiting.popleft()
        request = exchange.request
        assert request is not None
        message = SeenResponse(version, headers, conversation.now, status=status, reason=reason)
        exchange.response, self.exchange, self.message = message, exchange, message
        conversation.store.changed(exchange)
        is_tunnel = status == 101 or (request.method == "CONNECT" and status < 300)
        if exchange.upgrade or request.method == "CONNECT":
            exchange.upgrade = exchange.upgrade or "CONNECT"
            if not is_tunnel:
                exchange.upgrade = ""
            conversation.switch(exchange, accepted=is_tunnel)
        if is_tunnel:
            return RAW
        if request.method == "HEAD" or status in _NO_BODY:
            return 0
        if _is_chunked(message):
            return CHUNKED
        return _length(message, UNTIL_END)

    def on_message_end(self, trailers: Headers) -> bool:
        """See `MessageSink`."""
        self._end(trailers)
        return False


def _is_chunked(message: SeenMessage) -> bool:
    return message.header("transfer-encoding").lower().rpartition(",")[2].strip() == "chunked"


def _length(message: SeenMessage, default: int = 0) -> int:
    text = message.header("content-length").partition(",")[0].strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise NotHttpError("Content-Length is not a number of bytes")
    return int(text)
