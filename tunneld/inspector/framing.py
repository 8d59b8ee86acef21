"""Where messages of HTTP/1.1 begin and end, in one direction of a connection that is only looked at.

    head ──► body of a length │ chunks and trailers │ until the end ──► head ...        after an upgrade: raw

This is no participant: it cannot refuse what the two ends agree on, so it reads as tolerantly as they may. (h11, which
serves the inspector's page, can only be a participant: it wants to be told what was answered, ends a connection with
the first fault, and takes four times as long.) What it cannot follow raises `NotHttpError`, and the connection is not
looked at any more.

Bytes may be missing: `skip` tells how many, which a body survives.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Protocol

from tunneld.errors import RemoteProtocolError
from tunneld.inspector.records import Headers

CHUNKED, UNTIL_END, RAW = -1, -2, -3
"""What follows a head, where it is not a number of bytes. RAW: another protocol, for good."""

MAX_HEAD: Final = 32 * 1024
"""Bytes of a head. Servers refuse more than 8 to 32 KiB."""
MAX_FIELDS: Final = 500
"""Field lines of a head. Browsers send 20, servers refuse more than 100."""
MAX_LINE: Final = 4096
"""Bytes of the line with the size of a chunk. Real ones have up to 18."""
MAX_HELD: Final = 32 * 1024
"""Bytes behind a request for an upgrade, until the response says what they are."""

_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.DOTALL)


class NotHttpError(RemoteProtocolError):
    """The bytes are not HTTP/1.1, or cannot be followed; the message says why."""


class MessageSink(Protocol):
    """What a `MessageReader` finds."""

    def check(self, start: bytes) -> None:
        """The first bytes of a message. Raises `NotHttpError` if no message begins like that."""

    def on_head(self, start: str, headers: Headers) -> int:
        """A head is complete; returns what follows. Raises `NotHttpError`."""

    def on_body(self, data: memoryview) -> None:
        """Bytes of the body."""

    def on_missing(self, count: int) -> None:
        """Bytes of the body that were not looked at."""

    def on_message_end(self, trailers: Headers) -> bool:
        """The message is complete; returns whether to hold what follows, until `MessageReader.resume`."""

    def on_raw(self, data: memoryview) -> None:
        """Bytes of another protocol."""

    def on_raw_missing(self, count: int) -> None:
        """Bytes of it that were not looked at. Raises `NotHttpError` if it cannot go on without."""


class MessageReader:
    """Reads one direction of a connection."""

    def __init__(self, sink: MessageSink) -> None:
        self._sink = sink
        self._take: Callable[[memoryview], int] = self._take_head
        self._text = bytearray()  # a head or a line that is not complete, or what is held
        self._left = 0  # bytes of the body, or of the chunk
        self._is_chunked = False
        self._trailers: Headers = []

    @property
    def spare(self) -> int:
        """Bytes from here on that are body and nothing else."""
        if self._take == self._take_until_end:
            return 1 << 60
        return self._left if self._take == self._take_body else 0

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is the end of a message."""
        return self._take == self._take_until_end

    def feed(self, data: bytes) -> None:
        """Read bytes. Raises `NotHttpError`."""
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                at += self._take(view[at:])

    def skip(self, count: int) -> None:
        """Go on without the next `count` bytes. Raises `NotHttpError` if they were more than body."""
        if self._take == self._take_raw:
            self._sink.on_raw_missing(count)
        elif count <= self.spare:
            self._sink.on_missing(count)
            if self._take != self._take_until_end:
                self._count(count)
        else:
            raise NotHttpError("the inspector fell behind")

    def resume(self, framing: int) -> None:
        """Go on with what was held: RAW, or 0 for another message. Raises `NotHttpError`."""
        if self._take == self._hold:
            held, self._text = bytes(self._text), bytearray()
            self._take = self._take_raw if framing == RAW else self._take_head
            self.feed(held)

    # States: each takes at least one byte

    def _take_head(self, view: memoryview) -> int:
        text, before = self._text, len(self._text)
        text += view[: MAX_HEAD + 1 - before]
        if not before and text[0] in b"\r\n":  # an empty line in front of a message
            skipped = len(text) - len(text.lstrip(b"\r\n"))
            text.clear()
            return skipped
        if before < len(b"CONNECT "):
            self._sink.check(bytes(text[:64]))
        end = _END_OF_HEAD.search(text, max(0, before - 3))
        if end is None:
            if len(text) > MAX_HEAD:
                raise NotHttpError(f"a head exceeds {MAX_HEAD} bytes")
            return len(text) - before
        self._text = bytearray()
        start, headers = parse_head(bytes(text[: end.start()]))
        self._begin(self._sink.on_head(start, headers))
        return end.end() - before

    def _begin(self, framing: int) -> None:
        """Begin with what follows a head."""
        self._trailers = []
        if framing == CHUNKED:
            self._take = self._take_size
        elif framing == UNTIL_END:
            self._take = self._take_until_end
        elif framing == RAW:
            self._take = self._take_raw
        elif framing:
            self._left, self._take, self._is_chunked = framing, self._take_body, False
        else:
            self._end()

    def _end(self) -> None:
        self._take = self._hold if self._sink.on_message_end(self._trailers) else self._take_head

    def _take_body(self, view: memoryview) -> int:
        count = min(self._left, len(view))
        self._sink.on_body(view[:count])
        self._count(count)
        return count

    def _count(self, count: int) -> None:
        """So many bytes of the body or the chunk have passed."""
        self._left -= count
        if not self._left and self._is_chunked:
            self._take = self._take_chunk_end
        elif not self._left:
            self._end()

    def _take_until_end(self, view: memoryview) -> int:
        self._sink.on_body(view)
        return len(view)

    def _take_raw(self, view: memoryview) -> int:
        self._sink.on_raw(view)
        return len(view)

    def _hold(self, view: memoryview) -> int:
        self._text += view
        if len(self._text) > MAX_HELD:
            raise NotHttpError("too much was sent behind a request for an upgrade")
        return len(view)

    def _line(self, view: memoryview, limit: int) -> tuple[int, bytes | None]:
        """Take bytes of a line; returns how many, and the line without its end once it is complete."""
        window = bytes(view[: limit + 1])
        end = window.find(b"\n") + 1
        taken = end or len(window)
        self._text += window[:taken]
        if len(self._text) > limit:
            raise NotHttpError(f"a line of a chunked body exceeds {limit} bytes")
        if not end:
            return taken, None
        line, self._text = bytes(self._text).rstrip(b"\r\n"), bytearray()
        return taken, line

    def _take_size(self, view: memoryview) -> int:
        taken, line = self._line(view, MAX_LINE)
        if line is not None:
            found = _CHUNK_SIZE.fullmatch(line)
            if found is None:
                raise NotHttpError("the size of a chunk is not a number")
            self._left, self._is_chunked = int(found[1], 16), True
            self._take = self._take_body if self._left else self._take_trailer
        return taken

    def _take_chunk_end(self, view: memoryview) -> int:
        taken, line = self._line(view, MAX_LINE)
        if line:
            raise NotHttpError("a chunk is longer than its size")
        if line is not None:
            self._take = self._take_size
        return taken

    def _take_trailer(self, view: memoryview) -> int:
        taken, line = self._line(view, MAX_HEAD)
        if line:
            if len(self._trailers) >= MAX_FIELDS:
                raise NotHttpError(f"more than {MAX_FIELDS} trailers")
            self._trailers.append(_field(line))
        elif line is not None:
            self._end()
        return taken


def parse_head(head: bytes) -> tuple[str, Headers]:
    """The first line of a head, and its fields. A folded line belongs to the one before. Raises `NotHttpError`."""
    start, *lines = head.split(b"\n")
    if len(lines) > MAX_FIELDS:
        raise NotHttpError(f"a head has more than {MAX_FIELDS} fields")
    headers: Headers = []
    for line in lines:
        if line[:1] in {b" ", b"\t"} and headers:
            name, value = headers[-1]
            headers[-1] = name, f"{value} {line.decode('latin-1').strip()}"
        else:
            headers.append(_field(line.rstrip(b"\r")))
    return start.decode("latin-1").rstrip("\r"), headers


def _field(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("latin-1").partition(":")
    return name.strip(), value.strip(" \t")
