"""A writer of lines that never blocks.

A terminal can be stopped (Ctrl-S) and a pipe can be full, and a direct write would then block the agent, which could
not serve its visitors. So lines go through a bounded queue, and a thread writes them, many at a time.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from tunneld.cli.common import OutputError, OutputGoneError, printable_lines
from tunneld.errors import reason_of

MAX_QUEUED_LINES = 10_000
"""Lines kept for a slow reader, a few megabytes. Beyond that, the oldest are dropped."""
WRITE_PAUSE = 0.02
"""Seconds between two writes. Under load a thousand lines leave together, and the delay is not noticeable."""
FINAL_WRITE_TIMEOUT = 1.0
"""Seconds for the last lines to be written when the agent ends."""


class Writer:
    """A queue of lines for one descriptor, written by a thread."""

    def __init__(
        self, descriptor: int, *, vital: bool, on_failure: Callable[[str], None] = lambda _reason: None
    ) -> None:
        """`vital`: without a reader the program is useless, so a failed write raises from `open`; else lines are
        dropped. `on_failure` gets the reason for the first ones dropped.
        """
        self.descriptor = descriptor
        self._vital = vital
        self._on_failure = on_failure
        self._failed = False
        self._lines: deque[str] = deque(maxlen=MAX_QUEUED_LINES)
        self._has_lines = trio.Event()
        self._closing = False
        self._idle = trio.Event()  # nothing is queued or being written
        self._idle.set()
        self._scope = trio.CancelScope(shield=True)  # an error that ends the block does not end the writing

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        """Write during the block. Lines put before its end are still written, within `FINAL_WRITE_TIMEOUT`.

        Raises `OutputError` in a group if the descriptor is vital and cannot be written to.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            try:
                yield self
            finally:
                self._closing = True
                self._has_lines.set()
                self._scope.deadline = trio.current_time() + FINAL_WRITE_TIMEOUT

    @property
    def is_terminal(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self.descriptor)

    @property
    def queued(self) -> int:
        """How many texts wait to be written."""
        return len(self._lines)

    async def flush(self) -> None:
        """Wait until all has been written."""
        await self._idle.wait()

    def put(self, text: str) -> None:
        """Queue lines to be written soon, see `printable`. Never blocks, never raises."""
        self.draw(printable_lines(text))

    def draw(self, text: str) -> None:
        """Do the same for text with control sequences of our own."""
        self._lines.append(text)
        if self._idle.is_set():
            self._idle = trio.Event()
        self._has_lines.set()

    async def _run(self) -> None:
        with self._scope:
            while not (self._closing and not self._lines):
                await self._has_lines.wait()
                self._has_lines = trio.Event() if not self._closing else self._has_lines
                await self._write_queued()
                await trio.sleep(0 if self._closing else WRITE_PAUSE)

    async def _write_queued(self) -> None:
        text = "".join(self._lines)
        self._lines.clear()
        try:
            await trio.to_thread.run_sync(self._write, text.encode(errors="replace"), abandon_on_cancel=True)
        except OSError as error:
            reason = f"could not write to standard output: {reason_of(error)}"
            if self._vital:
                raise (OutputGoneError if isinstance(error, BrokenPipeError) else OutputError)(reason) from None
            if not self._failed:
                self._failed = True
                self._on_failure(reason)
        finally:
            if not self._lines:
                self._idle.set()

    def _write(self, data: bytes) -> None:
        """Write all of `data`, in a thread. The descriptor may be non-blocking: another process can have set that."""
        while data:
            try:
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:
                select.select([], [self.descriptor], [])
