"""Lines for a terminal, a pipe or a file, without ever waiting for them.

A terminal can be stopped (Ctrl-S) and a pipe can be full; whoever writes to them then waits, and an agent that waits
serves nobody. So lines go through a bounded store, and a thread writes them, many at a time.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tunneld.cli.common import OutputError, OutputGoneError
from tunneld.errors import reason_of

HELD = 10_000
"""Lines that wait for a slow reader: a few megabytes. Then the oldest go."""
PAUSE = 0.02
"""Seconds between two writes: under load a thousand lines leave together, and nobody notices the delay."""
FAREWELL = 1.0
"""Seconds that the last lines have at the end."""


class Writer:
    """What goes to one descriptor."""

    def __init__(self, descriptor: int, *, vital: bool) -> None:
        """`vital`: without a reader there is no point in going on, so `run` raises; else lines are dropped."""
        self._descriptor = descriptor
        self._vital = vital
        self._lines: deque[str] = deque(maxlen=HELD)
        self._some = trio.Event()
        self._ending = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Writer]:
        """Write during the block; what was put before its end is still written, in bounded time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            try:
                yield self
            finally:
                self._ending = True
                self._some.set()
                nursery.cancel_scope.deadline = trio.current_time() + FAREWELL
                nursery.cancel_scope.shield = True

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads it as it comes."""
        return os.isatty(self._descriptor)

    def put(self, text: str) -> None:
        """Write `text`, soon. Never waits, never raises."""
        self._lines.append(text)
        self._some.set()

    async def _run(self) -> None:
        while not (self._ending and not self._lines):
            await self._some.wait()
            self._some = trio.Event() if not self._ending else self._some
            text = "".join(self._lines)
            self._lines.clear()
            try:
                await trio.to_thread.run_sync(self._write, text.encode(errors="replace"), abandon_on_cancel=True)
            except OSError as error:
                if self._vital:
                    kind = OutputGoneError if isinstance(error, BrokenPipeError) else OutputError
                    raise kind(f"could not write to standard output: {reason_of(error)}") from None
            await trio.sleep(0 if self._ending else PAUSE)

    def _write(self, data: bytes) -> None:
        """In a thread: all of it, also where somebody made the descriptor non-blocking."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
