"""The processor time of a relay's turns: `python -m benchmarks.turns FILE ...` runs `tunneld ...` and counts them.

A turn is what the relay does between two waits for events: one round of Trio's scheduler, with a turn of the pump and
one step of each control connection that has something to do. While it lasts, every visitor waits. Unlike a latency,
its processor time is the same on a machine that has other work.

FILE has two histograms in shared memory, so `Turns` can read them while the relay runs: of turns, and of the full
collections of garbage, which are parts of them.
"""

from __future__ import annotations

import gc
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

OLDEST = 2
"""The generation of a full collection."""


class TurnInstrument(Instrument):
    """Counts the turns of this thread by their processor time."""

    def __init__(self, path: Path) -> None:
        """The file has a counter of four bytes for each bucket of both histograms."""
        with path.open("r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 0)).cast("I")
        self._began = self._collection_began = time.thread_time_ns()

    def on_collection(self, phase: str, info: dict[str, int]) -> None:
        """For `gc.callbacks`."""
        if info["generation"] < OLDEST:
            return
        if phase == "start":
            self._collection_began = time.thread_time_ns()
        else:
            self._count(BUCKETS, self._collection_began)

    def after_io_wait(self, timeout: float) -> None:
        """A turn begins."""
        self._began = time.thread_time_ns()

    def before_io_wait(self, timeout: float) -> None:
        """A turn is over."""
        self._count(0, self._began)

    def _count(self, first: int, began: int) -> None:
        self._counts[first + min((time.thread_time_ns() - began) // UNIT, BUCKETS - 1)] += 1


class Turns:
    """The turns of a relay since the last call of `begin`."""

    def __init__(self, path: Path) -> None:
        """Make the file."""
        self._path = path
        path.write_bytes(bytes(2 * 4 * BUCKETS))
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
        return self._percentile(part, 0)

    @property
    def longest_collection(self) -> float:
        """Milliseconds of the longest collection of the oldest generation; 0 if there was none."""
        return self._percentile(1, BUCKETS)

    @property
    def long_collections(self) -> int:
        """How many of these took more than 20 ms."""
        first = BUCKETS + 20_000_000 // UNIT
        return sum(self._read()[first:]) - sum(self._before[first:])

    def _percentile(self, part: float, first: int) -> float:
        last = first + BUCKETS
        counts = [now - before for now, before in zip(self._read()[first:last], self._before[first:last], strict=True)]
        rest = part * sum(counts)
        for bucket, number in enumerate(counts):
            rest -= number
            if number and rest <= 0:
                return (bucket + 1) * UNIT / 1e6
        return 0.0

    def _read(self) -> array[int]:
        return array("I", self._path.read_bytes())


if __name__ == "__main__":
    instrument = TurnInstrument(Path(sys.argv.pop(1)))
    gc.callbacks.append(instrument.on_collection)
    trio.run = partial(trio.run, instruments=[instrument])  # type: ignore[assignment]
    sys.exit(main())
