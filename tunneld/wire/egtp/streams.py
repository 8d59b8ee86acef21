"""Byte streams over EGTP messages: the frames in a message, and the state of each stream. Pure.

    frame = kind 1 | stream 4 | value 4 | payload       numbers are big endian

    OPEN      payload: the label of the tunnel; value: its length
    DATA      payload: octets of the stream; value: their number
    CREDIT    value: octets that the receiver may send in addition on this stream
    EOF       the sender sends no more on this stream
    RESET     payload: the reason, in UTF-8; value: its length. The stream is over in both directions
    RETIRE    stream 0: the receiver is to open no more streams
    GOODBYE   stream 0; payload: the reason. The association is over, and so is every stream

A frame is never split between messages. The node that made the association opens streams with odd ids, the other one
those with even ids, each in ascending order; an id is used once. A stream begins with `INITIAL_CREDIT` in both
directions. Frames of a stream that is over are ignored: they crossed the reset.

Messages may be lost, repeated and reordered; `delivery` puts that right, so that frames arrive here in order and once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tunneld.errors import LimitReachedError, RemoteProtocolError

OPEN, DATA, CREDIT, EOF, RESET, RETIRE, GOODBYE = range(1, 8)
HEADER = struct.Struct(">BII")
INITIAL_CREDIT = 64 * 1024
"""Octets that each side may send on a stream before it is granted credit."""
MAX_CREDIT = (1 << 32) - 1
MAX_TEXT = 256
"""Octets of a label or a reason."""
MAX_PEER_STREAMS = 128
"""Streams that the peer may have opened and that are not over: a relay opens them, and is not asked for more."""
MAX_IDS = 1 << 32
ASSOCIATION = 0
"""The stream id of frames about all streams."""


class Stream:
    """One byte stream."""

    __slots__ = ("allowance", "credit", "ended", "finished", "sid")

    def __init__(self, sid: int) -> None:
        self.sid = sid
        self.credit = INITIAL_CREDIT  # octets that we may send
        self.allowance = INITIAL_CREDIT  # octets that the peer may send
        self.finished = False  # we have sent EOF
        self.ended = False  # the peer has


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream."""

    sid: int
    label: bytes


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer sends no more on this stream. If we do not either, it is over."""

    sid: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer ended the stream in both directions."""

    sid: int
    reason: str


@dataclass(frozen=True, slots=True)
class StreamCredit:
    """The peer lets us send more on this stream."""

    sid: int


@dataclass(frozen=True, slots=True)
class PeerRetired:
    """The peer wants no more streams."""


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The peer ended the association."""

    reason: str


StreamItem = tuple[int, memoryview] | StreamOpened | StreamEnded | StreamReset | StreamCredit | PeerRetired | PeerLeft
"""What `parse` yields; a tuple is data of a stream."""


class Streams:
    """The streams of one association, at one end. Frames to be sent are appended to `outgoing`; the caller takes them
    out, always all of them.
    """

    def __init__(self, *, initiator: bool) -> None:
        """`initiator`: this node made the association."""
        self.outgoing = bytearray()
        self.streams: dict[int, Stream] = {}
        self._parity = 1 if initiator else 0
        self._next = 1 if initiator else 2
        self._next_of_peer = 2 if initiator else 1
        self._opened_by_peer = 0
        self._frames: bytes | memoryview = b""  # being parsed
        self._at = 0
        self._backlog: list[bytes | memoryview] = []  # to be parsed after that

    # Sending

    def open(self, label: bytes) -> Stream:
        """Open a stream. Raises `LimitReachedError` when all ids of the association were used."""
        if self._next >= MAX_IDS:
            raise LimitReachedError("could not open a stream: all ids of the association were used")
        sid = self._next
        self._next += 2
        stream = self.streams[sid] = Stream(sid)
        self._text(OPEN, sid, label)
        return stream

    def send(self, stream: Stream, data: memoryview) -> int:
        """Send as much of `data` as the credit permits; returns how much that was."""
        size = min(len(data), stream.credit)
        if size and not stream.finished:
            stream.credit -= size
            self.outgoing += HEADER.pack(DATA, stream.sid, size)
            self.outgoing += data[:size]
            return size
        return 0

    def grant(self, sid: int, size: int) -> None:
        """Let the peer send `size` more octets."""
        stream = self.streams.get(sid)
        if stream is not None and not stream.ended:
            stream.allowance += size
            self.outgoing += HEADER.pack(CREDIT, sid, size)

    def finish(self, sid: int) -> None:
        """Send no more on this stream."""
        stream = self.streams.get(sid)
        if stream is not None and not stream.finished:
            stream.finished = True
            self.outgoing += HEADER.pack(EOF, sid, 0)
            if stream.ended:
                self._remove(sid)

    def reset(self, sid: int, reason: str) -> None:
        """End a stream in both directions. Does nothing if it is over."""
        if sid in self.streams:
            self._remove(sid)
            self._text(RESET, sid, reason.encode())

    def retire(self) -> None:
        """Ask the peer to open no more streams."""
        self.outgoing += HEADER.pack(RETIRE, ASSOCIATION, 0)

    def leave(self, reason: str) -> None:
        """End the association."""
        self.streams.clear()
        self._text(GOODBYE, ASSOCIATION, reason.encode())

    # Receiving

    @property
    def has_unparsed(self) -> bool:
        """Whether frames were received that `parse` has not yielded."""
        return self._at < len(self._frames) or bool(self._backlog)

    def receive(self, frames: bytes | memoryview) -> None:
        """Add the frames of the next message, for `parse`."""
        if self._at < len(self._frames) or self._backlog:
            self._backlog.append(frames)
        else:
            self._frames, self._at = frames, 0

    def parse(self, max_frames: int) -> Iterator[StreamItem]:
        """Parse at most that many frames; what each means is done before the next is parsed.

        Raises `RemoteProtocolError`; the association is over then.
        """
        for _ in range(max_frames):
            if self._at >= len(self._frames):
                if not self._backlog:
                    return
                self._frames, self._at = self._backlog.pop(0), 0
                continue
            frames, at = self._frames, self._at
            if len(frames) - at < 9:
                raise RemoteProtocolError("a frame was cut")
            kind, sid, value = HEADER.unpack_from(frames, at)
            at += 9
            if kind == DATA:
                end = at + value
                if end > len(frames):
                    raise RemoteProtocolError("a frame was cut")
                self._at = end
                stream = self.streams.get(sid)
                if stream is None:
                    self._check_known(sid)
                elif value > stream.allowance or stream.ended:
                    raise RemoteProtocolError("data after the end of a stream" if stream.ended else "credit exceeded")
                elif value:
                    stream.allowance -= value
                    yield sid, memoryview(frames)[at:end]
            else:
                item = self._parse_control(kind, sid, value, at)
                if item is not None:
                    yield item

    def _parse_control(self, kind: int, sid: int, value: int, at: int) -> StreamItem | None:
        self._at = at
        stream = self.streams.get(sid)
        if kind in {CREDIT, EOF}:
            if stream is None:
                self._check_known(sid)
                return None
            return self._add_credit(stream, value) if kind == CREDIT else self._end(stream, value)
        if kind == RETIRE and sid == ASSOCIATION and not value:
            return PeerRetired()
        if kind not in {OPEN, RESET, GOODBYE}:
            raise RemoteProtocolError(f"unrecognized frame {kind}")
        end = at + value
        if value > MAX_TEXT or end > len(self._frames):
            raise RemoteProtocolError("a text is too long")
        text = bytes(self._frames[at:end])
        self._at = end
        if kind == OPEN:
            return self._accept(sid, text)
        reason = text.decode(errors="replace")
        if kind == GOODBYE:
            if sid != ASSOCIATION:
                raise RemoteProtocolError("a goodbye of one stream")
            self.streams.clear()
            return PeerLeft(reason)
        if stream is None:
            self._check_known(sid)
            return None
        self._remove(sid)
        return StreamReset(sid, reason)

    def _add_credit(self, stream: Stream, value: int) -> StreamItem | None:
        if stream.credit + value > MAX_CREDIT:
            raise RemoteProtocolError("more than 2^32 octets of credit")
        stream.credit += value
        return StreamCredit(stream.sid)

    def _end(self, stream: Stream, value: int) -> StreamItem | None:
        if stream.ended or value:
            raise RemoteProtocolError("a stream ended twice" if stream.ended else "an end of file with a value")
        stream.ended = True
        if stream.finished:
            self._remove(stream.sid)
        return StreamEnded(stream.sid)

    def _accept(self, sid: int, label: bytes) -> StreamItem:
        if sid != self._next_of_peer:
            raise RemoteProtocolError(f"stream {sid} was opened, {self._next_of_peer} is the next")
        self._next_of_peer += 2
        self.streams[sid] = Stream(sid)
        return StreamOpened(sid, label)

    def _check_known(self, sid: int) -> None:
        """Raise unless there was a stream with this id."""
        following = self._next if sid & 1 == self._parity else self._next_of_peer
        if not ASSOCIATION < sid < following:
            raise RemoteProtocolError(f"a frame of stream {sid}, which was never opened")

    def _remove(self, sid: int) -> None:
        del self.streams[sid]

    def _text(self, kind: int, sid: int, text: bytes) -> None:
        text = text[:MAX_TEXT]
        self.outgoing += HEADER.pack(kind, sid, len(text))
        self.outgoing += text
