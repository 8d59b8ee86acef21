"""Octets in, lines out, in bounded memory. Pure."""

from __future__ import annotations

from tunneld.errors import RemoteProtocolError
from tunneld.wire.lines import MAX_LINE


class LineBuffer:
    """Cuts a stream into lines.

    `feed` what arrived, then take lines until `next_line` has none; whoever reads from the network only when there is
    none holds at most one unfinished line and one read. Lines stay octets inside, so a pipelined flood costs what it
    weighs and no more.
    """

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._octets = bytearray()
        self._scanned = 0  # no line end lies before this, so a line that comes octet by octet is searched once

    def __len__(self) -> int:
        """Octets held: at most one line and one read."""
        return len(self._octets)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add what arrived."""
        self._octets += data

    def next_line(self) -> bytes | None:
        """Take the next whole line, without its LF or CRLF; None when none is complete.

        Raises `RemoteProtocolError` when the next line is longer than the limit, complete or not, and then for good:
        feed no more.
        """
        end = self._octets.find(b"\n", self._scanned)
        self._scanned = len(self._octets) if end < 0 else 0
        line = bytes(self._octets[: end if end >= 0 else self._limit + 2]).removesuffix(b"\r")
        if len(line) > self._limit:
            self._scanned = 0
            raise RemoteProtocolError(
                f"line is longer than {self._limit} octets; send shorter ones, each with a line end"
            )
        if end < 0:
            return None
        del self._octets[: end + 1]
        return line
