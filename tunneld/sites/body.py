"""The body of a message on its way: where it ends. Pure."""

from __future__ import annotations

from tunneld.engine.limits import UNLIMITED
from tunneld.sites.fields import ORIGIN_FIELDS
from tunneld.wire.chunked import FORBIDDEN_TRAILERS, ChunkedBody

_FORBIDDEN = FORBIDDEN_TRAILERS | ORIGIN_FIELDS


class Body:
    """A body of known length, a chunked one, or one that ends with the connection."""

    __slots__ = ("_chunks", "_left", "ends_with_connection")

    def __init__(self, length: int | None, *, until_close: bool = False) -> None:
        """`length` is in bytes; None: chunked. `until_close`: neither, it ends with the connection."""
        self.ends_with_connection = until_close
        self._left = 0 if length is None else length
        self._chunks = ChunkedBody(_FORBIDDEN) if length is None and not until_close else None

    @property
    def is_over(self) -> bool:
        """Whether the last byte was taken."""
        if self.ends_with_connection:
            return False
        return self._left == 0 if self._chunks is None else self._chunks.is_over

    @property
    def left(self) -> int:
        """Bytes that may pass without a look at them; 0 for chunks."""
        if self.ends_with_connection:
            return UNLIMITED
        return self._left if self._chunks is None else 0

    def skip(self, count: int) -> None:
        """Some of `left` have passed."""
        if not self.ends_with_connection:
            self._left -= count

    def take(self, data: memoryview) -> tuple[int, bytes | bytearray | memoryview]:
        """Take bytes: return how many belong to the body, and what goes on for them, which is never longer. Raises
        `HeadError`.
        """
        if self._chunks is not None:
            return self._chunks.feed(data)
        if self.ends_with_connection:
            return len(data), data
        count = min(self._left, len(data))
        self._left -= count
        return count, data[:count]
