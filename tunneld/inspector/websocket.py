"""The frames of a WebSocket in one direction (RFC 6455 §5), and what permessage-deflate (RFC 7692) has made of them.

    opcode, length, mask ──► payload: unmasked ──► decompressed, as long as nothing is missing ──► SeenFrame

A compressed message needs all messages before it, unless the two ends have agreed on `no_context_takeover`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

from tunneld.inspector.framing import NotHttpError
from tunneld.inspector.records import SeenFrame

EXTENSION: Final = "permessage-deflate"
_TAIL: Final = b"\x00\x00\xff\xff"
"""What RFC 7692 leaves out at the end of a message."""
_CONTROL: Final = 8
"""Opcodes from here on are control frames: never compressed, and between the frames of a message."""


class Inflater:
    """Decompresses the messages of one direction, as far as its limit."""

    def __init__(self, limit: int, *, keeps_context: bool) -> None:
        self._limit = limit
        self._keeps_context = keeps_context
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
        self._is_broken = False  # something is missing, or was too large

    def inflate(self, data: bytes, *, is_final: bool, is_whole: bool) -> bytes | None:
        """The content of a frame; None where it cannot be told. `is_whole`: `data` is all of the frame."""
        out: bytes | None = None
        if not is_whole:
            self._is_broken = True
        if not self._is_broken:
            try:
                out = self._zlib.decompress(data + (_TAIL if is_final else b""), self._limit)
            except zlib.error:
                self._is_broken, out = True, None
            else:
                self._is_broken = bool(self._zlib.unconsumed_tail)
        if is_final and not self._keeps_context:
            self._zlib, self._is_broken = zlib.decompressobj(-zlib.MAX_WBITS), False
        return out


class WebSocketReader:
    """Reads the frames of one direction; calls `on_frame` with each."""

    def __init__(
        self, on_frame: Callable[[SeenFrame], None], inflater: Inflater | None, limit: int, *, is_request: bool
    ) -> None:
        """`limit`: bytes kept of each frame."""
        self._on_frame = on_frame
        self._inflater = inflater
        self._limit = limit
        self._is_request = is_request
        self._head = bytearray()
        self._mask = b""
        self._payload = bytearray()  # as far as it is kept
        self._size = 0
        self._left = -1  # bytes of the payload to come; negative: in a head
        self._is_compressed = False  # the message is

    @property
    def spare(self) -> int:
        """Bytes from here on that are payload, and not kept."""
        return max(0, self._left) if len(self._payload) >= self._limit else 0

    def feed(self, data: memoryview, now: float) -> None:
        """Read bytes."""
        at = 0
        while at < len(data):
            if self._left < 0:
                at += self._take_head(data[at:], now)
                continue
            part = data[at : at + self._left]
            self._payload += part[: max(0, self._limit - len(self._payload))]
            at += len(part)
            self._pass(len(part), now)

    def skip(self, count: int, now: float) -> None:
        """Go on without the next `count` bytes. Raises `NotHttpError` if a head was among them."""
        if count > max(0, self._left):
            raise NotHttpError("the inspector fell behind")
        self._pass(count, now)

    def _take_head(self, data: memoryview, now: float) -> int:
        head, before = self._head, len(self._head)
        head += data[: 14 - before]
        if len(head) < 2:
            return len(head) - before
        length, is_masked = head[1] & 0x7F, bool(head[1] & 0x80)
        more = {126: 2, 127: 8}.get(length, 0)
        size = 2 + more + (4 if is_masked else 0)
        if len(head) < size:
            return len(head) - before
        self._size = self._left = int.from_bytes(head[2 : 2 + more], "big") if more else length
        self._mask = bytes(head[size - 4 : size]) if is_masked else b""
        del head[size:]
        if not self._left:
            self._pass(0, now)
        return size - before

    def _pass(self, count: int, now: float) -> None:
        """So many bytes of the payload have passed."""
        self._left -= count
        if not self._left:
            first, data = self._head[0], _unmasked(bytes(self._payload), self._mask)
            self._left, self._head, self._payload = -1, bytearray(), bytearray()
            self._on_frame(self._seen(first, data, now))

    def _seen(self, first: int, data: bytes, now: float) -> SeenFrame:
        opcode, is_final = first & 0x0F, bool(first & 0x80)
        if opcode and opcode < _CONTROL:
            self._is_compressed = bool(first & 0x40)
        is_compressed = self._is_compressed and opcode < _CONTROL
        if is_compressed and self._inflater is not None:
            inflated = self._inflater.inflate(data, is_final=is_final, is_whole=len(data) == self._size)
            is_compressed, data = inflated is None, data if inflated is None else inflated
        return SeenFrame(self._is_request, opcode, is_final, data, self._size, is_compressed, now)


def _unmasked(data: bytes, mask: bytes) -> bytes:
    if not mask or not data:
        return data
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")


def keeps_context(extensions: str, side: str) -> bool | None:
    """Whether messages of a side (`client`, `server`) need what came before; None if they are not compressed."""
    for extension in extensions.split(","):
        name, *parameters = (part.strip().lower() for part in extension.split(";"))
        if name == EXTENSION:
            return f"{side}_no_context_takeover" not in parameters
    return None
