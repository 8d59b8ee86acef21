"""The descriptor behind the log, written so that it can neither stop nor kill the process.

A write to a pipe whose reader sleeps, or to a terminal stopped by Ctrl-S, would block, and with it every relay of the
process. `O_NONBLOCK` is no way out: it belongs to the open file, which the shell and others share. But a descriptor
that poll(2) calls writable takes `PIPE_BUF` octets without blocking (pipe(7)), so lines leave in pieces of at most that
size, each after a poll.
"""

from __future__ import annotations

import io
import os
import select
from typing import TextIO

PATIENCE_MS = (
    100  # once, for a reader that is only slow; after a line was lost there is no waiting until it reads again
)


class Sink:
    """Lines to a stream: through its descriptor if it has one, else through its `write`; None swallows everything."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._descriptor = descriptor_of(stream)
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._patience_ms = PATIENCE_MS
        self._torn = False  # a line was cut in the middle: the next one must not continue it

    def put(self, line: str) -> bool:
        """Write one line and its end. False if it, or a part of it, was lost."""
        if self._stream is None:
            return True
        if self._descriptor is None:
            return self._put_by_stream(line)
        data = (("\n" if self._torn else "") + line + "\n").encode(self._encoding, "backslashreplace")
        written = self._put_by_descriptor(self._descriptor, data)
        complete = written == len(data)
        self._torn = not complete and (written > 0 or self._torn)
        self._patience_ms = PATIENCE_MS if complete else 0
        return complete

    def _put_by_stream(self, line: str) -> bool:
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):  # ValueError: it was closed
            return False
        return True

    def _put_by_descriptor(self, descriptor: int, data: bytes) -> int:
        """How many octets of `data` could be written without blocking for longer than our patience."""
        written = 0
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            while written < len(data) and poll.poll(self._patience_ms):
                written += os.write(descriptor, data[written : written + select.PIPE_BUF])
        except OSError:  # no reader, no space, no terminal any more
            return written
        return written


def descriptor_of(stream: TextIO | None) -> int | None:
    """The number of the descriptor behind a stream, None for a stream in memory or a closed one."""
    try:
        return stream.fileno() if stream is not None else None
    except (OSError, ValueError, io.UnsupportedOperation):
        return None
