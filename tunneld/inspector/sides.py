"""The two sides of a conversation: what their readers find becomes exchanges."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tunneld.inspector.framing import CHUNKED, RAW, UNTIL_END, NotHttpError
from tunneld.inspector.records import (
    REQUEST,
    Exchange,
    Headers,
    SeenFrame,
    SeenMessage,
    SeenRequest,
    SeenResponse,
    cost_of_headers,
)
from tunneld.inspector.websocket import WebSocketReader

if TYPE_CHECKING:
    from tunneld.inspector.conversation import Conversation

MAX_INTERIM = 100
"""Interim responses noted of one request. Servers send one."""
TLS_INSIDE = (
    "TLS between the visitor and the local server: this agent cannot read it. Expose the local server's plain HTTP "
    "port, or let TLS end at the relay (--host) or here (--https-here)"
)

_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}(?: .*)?", re.DOTALL)
_VERSION = re.compile(r"HTTP/(1\.[0-9])")
_STATUS_LINE = re.compile(r"HTTP/(1\.[0-9]) +([1-9][0-9]{2})(?: (.*))?")
_NO_BODY = frozenset({204, 304})


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
        method, _, rest = start.strip().partition(" ")  # no pattern: one with spaces and anything takes long to fail
        target, _, version = rest.rpartition(" ")
        found, target = _VERSION.fullmatch(version), target.strip()
        if found is None or not target:
            raise NotHttpError("not HTTP/1.1: " + ("HTTP/2" if start.startswith("PRI ") else "no request line"))
        conversation = self.conversation
        self.message = SeenRequest(found[1], headers, conversation.now, method=method, target=target)
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
            if len(exchange.interim) < MAX_INTERIM:
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
