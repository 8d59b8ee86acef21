"""Writing log lines to a descriptor without blocking or ending the process.

A write to a full pipe, or to a terminal stopped by Ctrl-S, would block, and with it all connections of the process.
Setting `O_NONBLOCK` is no solution, since the flag belongs to the open file, which other processes such as the shell
share. But if poll(2) reports a descriptor as writable, it takes `PIPE_BUF` bytes without blocking (pipe(7)). So lines
are written in parts of at most that size, each after a poll.
"""

from __future__ import annotations

import os
import select
from typing import TextIO

from tunneld.log import descriptor_of

POLL_TIMEOUT_MS = 100
"""Milliseconds to wait for a slow reader. After a line was lost, there is no wait until the reader reads again."""


class Sink:
    """Writes lines to a stream, through its descriptor if it has one, else through `write`. None discards all lines."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._descriptor = descriptor_of(stream)
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._timeout_ms = POLL_TIMEOUT_MS
        self._incomplete = False  # a line was cut off: the next one must not continue it

    def put(self, line: str) -> bool:
        """Write a line and a newline. Returns False if the line or a part of it was lost."""
        if self._stream is None:
            return True
        if self._descriptor is None:
            return self._put_by_stream(line)
        data = (("\n" if self._incomplete else "") + line + "\n").encode(self._encoding, "backslashreplace")
        written = self._put_by_descriptor(self._descriptor, data)
        complete = written == len(data)
        self._incomplete = not complete and (written > 0 or self._incomplete)
        self._timeout_ms = POLL_TIMEOUT_MS if complete else 0
        return complete

    def _put_by_stream(self, line: str) -> bool:
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return False
        return True

    def _put_by_descriptor(self, descriptor: int, data: bytes) -> int:
        """Write as much of `data` as is possible without waiting longer than the timeout. Returns the bytes written."""
        written = 0
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            while written < len(data) and poll.poll(self._timeout_ms):
                written += os.write(descriptor, data[written : written + select.PIPE_BUF])
        except OSError:  # no reader, no space, or the terminal is gone
            return written
        return written
