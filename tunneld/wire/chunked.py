"""Chunked bodies (RFC 9112 §7.1), passed on as they arrive. Pure.

    5;extension CRLF  hello CRLF  0 CRLF  trailer: value CRLF  CRLF
    └ size line       └ data      └ last  └ trailer section

Sizes are written again without extensions, which nobody uses but request smugglers. What comes out is never longer than
what went in, so a caller that limits the input limits the output.
"""

from __future__ import annotations

import re
from enum import Enum

from tunneld.wire.http1 import HeadError
from tunneld.wire.http_fields import HOP_BY_HOP

MAX_SIZE_LINE_BYTES = 256
"Bytes of a size line with its extension. Real ones have up to 18."
MAX_TRAILER_BYTES = 8192
"Bytes of a trailer section: gRPC and checksums need some hundred."
MAX_SIZE_DIGITS = 15
"Digits of a size: 2^60 bytes. A size that overflows 64 bits is an attack."

FORBIDDEN_TRAILERS = HOP_BY_HOP | {
    *(b"content-length", b"host", b"content-encoding", b"content-type", b"content-range", b"trailer", b"expect"),
    *(b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"location", b"x-request-id"),
}
"""Fields that change how a message is read, or for whom, must not arrive behind it (RFC 9110 §6.5.1): some servers add
trailers to the fields of the head.
"""

_SIZE = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_TRAILER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*[^\x00-\x08\x0a-\x1f\x7f]*")


class _Part(Enum):
    """What comes next."""

    SIZE = "size"
    DATA = "data"
    DATA_END = "data end"
    TRAILER = "trailer"
    OVER = "over"


class ChunkedBody:
    """One chunked body on its way through the relay."""

    __slots__ = ("_forbidden", "_left", "_line", "_part", "_trailer_bytes")

    def __init__(self, forbidden: frozenset[bytes] = FORBIDDEN_TRAILERS) -> None:
        """Trailer fields with these names, in lower case, are left out, even if `_` is written for `-`."""
        self._forbidden = forbidden
        self._part = _Part.SIZE
        self._left = 0  # bytes of the chunk that are to come
        self._line = bytearray()  # a line that is not complete
        self._trailer_bytes = 0

    @property
    def is_over(self) -> bool:
        """Whether the body is complete."""
        return self._part is _Part.OVER

    def feed(self, data: memoryview) -> tuple[int, bytes | bytearray | memoryview]:
        """Take bytes of the body; return how many belonged to it, and what goes to the other side for them, which may
        be a part of `data` itself. Takes all of `data` unless the body ends in it.

        Raises `HeadError`; the connection cannot be used any more then.
        """
        size = len(data)
        if self._part is _Part.DATA and size <= self._left:  # in the middle of a large chunk: nothing to look at
            self._left -= size
            if not self._left:
                self._part = _Part.DATA_END
            return size, data
        out = bytearray()
        at = 0
        while at < size and self._part is not _Part.OVER:
            if self._part is _Part.DATA:
                count = min(self._left, size - at)
                out += data[at : at + count]
                at += count
                self._left -= count
                if not self._left:
                    self._part = _Part.DATA_END
            else:
                at += self._feed_line(data[at:], out)
        return at, out

    def _feed_line(self, data: memoryview, out: bytearray) -> int:
        """Take bytes until the end of a line; return how many."""
        limit = MAX_TRAILER_BYTES - self._trailer_bytes if self._part is _Part.TRAILER else MAX_SIZE_LINE_BYTES
        window = bytes(data[: limit + 2])
        end = window.find(b"\n")
        taken = len(window) if end < 0 else end + 1
        self._line += window[:taken]
        if len(self._line) > limit:
            raise HeadError(f"line of a chunked body exceeds {limit} bytes")
        if end < 0:
            return taken
        if not self._line.endswith(b"\r\n"):
            raise HeadError("line of a chunked body does not end with CRLF")
        line = bytes(self._line[:-2])
        self._line.clear()
        self._on_line(line, out)
        return taken

    def _on_line(self, line: bytes, out: bytearray) -> None:
        if self._part is _Part.SIZE:
            self._on_size(line, out)
        elif self._part is _Part.DATA_END:
            if line:
                raise HeadError("chunk is longer than its size")
            out += b"\r\n"
            self._part = _Part.SIZE
        else:
            self._on_trailer(line, out)

    def _on_size(self, line: bytes, out: bytearray) -> None:
        found = _SIZE.fullmatch(line)
        if found is None or len(found[1]) > MAX_SIZE_DIGITS:
            raise HeadError("chunk size is no hexadecimal number below 2^60")
        self._left = int(found[1], 16)
        out += b"%x\r\n" % self._left
        self._part = _Part.DATA if self._left else _Part.TRAILER

    def _on_trailer(self, line: bytes, out: bytearray) -> None:
        self._trailer_bytes += len(line) + 2
        if not line:
            self._part = _Part.OVER
            out += b"\r\n"
            return
        found = _TRAILER.fullmatch(line)
        if found is None:
            raise HeadError("malformed trailer field")
        if found[1].lower().replace(b"_", b"-") not in self._forbidden:
            out += line + b"\r\n"
