"""One connection, as it is looked at: requests on one side, responses on the other, in the same order.

request side   ──► a new exchange, waits ──┐
response side  ──► its response  ◄─────────┘ ──► done             101: the rest is another protocol
"""

from __future__ import annotations

from collections import deque
from typing import Final

from tunneld.errors import RemoteProtocolError
from tunneld.inspector.framing import RAW, MessageReader, NotHttpError
from tunneld.inspector.records import FRAME_COST, REQUEST, RESPONSE, Exchange, SeenFrame, SeenRequest
from tunneld.inspector.sides import RequestSide, ResponseSide
from tunneld.inspector.store import ExchangeStore
from tunneld.inspector.websocket import Inflater, keeps_context
from tunneld.wire.proxy_protocol import missing_v2

MAX_WAITING: Final = 100
"""Requests of one connection that wait for their responses. Browsers do not pipeline; tools send some ten."""
SPEAKS_FIRST = "not HTTP: the local server speaks first"


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
