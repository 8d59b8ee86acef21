"""The processor time of a relay's turns: `python -m benchmarks.turns FILE ...` runs `tunneld ...` and counts them.

A turn is what the relay does between two waits for events: one round of Trio's scheduler, with a turn of the pump and
one step of each control connection that has something to do. While it lasts, every visitor waits. Unlike a latency,
its processor time is the same on a machine that has other work.

FILE is a histogram in shared memory, so `Turns` can read it while the relay runs.
"""

from __future__ import annotations

import mmap
import sys
import time
from array import array
from functools import partial
from pathlib import Path

import trio
from trio.abc import Instrument

from tunneld.cli.tunneld import main

BUCKETS = 10_000
UNIT = 100_000
"""Nanoseconds of a bucket; the last one also counts the turns that took longer than a second."""


class TurnInstrument(Instrument):
    """Counts the turns of this thread by their processor time."""

    def __init__(self, path: Path) -> None:
        """The file has a counter of four bytes for each bucket."""
        with path.open("r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 0)).cast("I")
        self._began = time.thread_time_ns()

    def after_io_wait(self, timeout: float) -> None:
        """A turn begins."""
        self._began = time.thread_time_ns()

    def before_io_wait(self, timeout: float) -> None:
        """A turn is over."""
        self._counts[min((time.thread_time_ns() - self._began) // UNIT, BUCKETS - 1)] += 1


class Turns:
    """The turns of a relay since the last call of `begin`."""

    def __init__(self, path: Path) -> None:
        """Make the file."""
        self._path = path
        path.write_bytes(bytes(4 * BUCKETS))
        self._before = self._read()

    @property
    def command(self) -> tuple[str, ...]:
        """The command that takes the place of `tunneld`."""
        return sys.executable, "-m", "benchmarks.turns", str(self._path)

    def begin(self) -> None:
        """Count from here."""
        self._before = self._read()

    def percentile(self, part: float) -> float:
        """Milliseconds that this part of the turns did not exceed; with 1, the longest one."""
        counts = [now - before for now, before in zip(self._read(), self._before, strict=True)]
        rest = part * sum(counts)
        for bucket, number in enumerate(counts):
            rest -= number
            if number and rest <= 0:
                return (bucket + 1) * UNIT / 1e6
        return 0.0

    def _read(self) -> array[int]:
        return array("I", self._path.read_bytes())


if __name__ == "__main__":
    trio.run = partial(trio.run, instruments=[TurnInstrument(Path(sys.argv.pop(1)))])  # type: ignore[assignment]
    sys.exit(main())
