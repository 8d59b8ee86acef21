"""A file of lines that never holds up the event loop: the access log, and the records of visitors.

    put ──► list ──► one batch at a time, in a thread ──► file
             │
             └ full: the entry is lost, and counted

Neither a slow disk nor a full pipe stops the relay. The file is opened again before the next batch where it was renamed
or removed, as logrotate(8) does, and after `reopen`.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import structlog
import trio

from tunneld.errors import reason_of

MAX_ENTRIES = 16_384
"""Entries that wait for a slow disk, at about 1 KiB each."""

CLOSING_SECONDS = 1.0
"""For the last lines, when the relay stops."""

REPORT_INTERVAL = 60.0
"""Seconds between two messages about lost lines: a disk that stays full is reported once a minute, with the number."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("log")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LogTarget(Generic[T]):
    """Where the lines go, and what they look like."""

    path: Path | None  # None: standard error
    format: Callable[[T], str]  # called in a thread; its result ends with a newline


class LineLog(Generic[T]):
    """Writes entries as lines, to where `target` says; None: they are dropped."""

    def __init__(self, what: str, target: Callable[[], LogTarget[T] | None]) -> None:
        """`what` names it in messages: `access log`."""
        self.lost = 0  # lines since the start
        self._event, self._cannot_open = f"{what} lost lines", f"{what}: could not open the file"
        self._target = target
        self._entries: list[T] = []
        self._unreported = 0
        self._reason = ""  # why lines were lost last
        self._reported_at = -math.inf
        self._wake = trio.Event()
        self._file = _OpenFile()
        self._writing = trio.Lock()

    @property
    def waiting(self) -> int:
        """Entries whose lines are not being written yet."""
        return len(self._entries)

    def put(self, entry: T) -> None:
        """Write a line for this entry soon, or count it as lost."""
        if len(self._entries) >= MAX_ENTRIES:
            self._lose(1, "the disk or the reader is too slow")
            return
        self._entries.append(entry)
        self._wake.set()

    def reopen(self) -> None:
        """Open the file again now; its place may have changed, too."""
        self._file.reopens = True
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write lines until cancelled, and then the last ones."""
        task_status.started()
        try:
            await self.flush()
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                await self.flush()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSING_SECONDS):
                await self.flush()
                if self._file.is_written:  # by a thread that the cancellation has left behind
                    await trio.to_thread.run_sync(self._file.wait, abandon_on_cancel=True)
            self._report(at_once=True)
            self._file.close()

    async def flush(self) -> None:
        """Write what has gathered."""
        async with self._writing:
            entries, self._entries = self._entries, []
            target = self._target()
            if target is not None and (entries or (self._file.reopens and target.path is not None)):
                try:
                    await trio.to_thread.run_sync(self._file.write, target, entries, abandon_on_cancel=True)
                except OSError as error:
                    self._file.reopens = True
                    self._lose(len(entries), reason_of(error))
                    if not entries:
                        log.warning(self._cannot_open, path=str(target.path), reason=reason_of(error))
            self._report()

    def _lose(self, count: int, reason: str) -> None:
        self.lost += count
        self._unreported += count
        self._reason = reason

    def _report(self, *, at_once: bool = False) -> None:
        now = trio.current_time()
        if self._unreported and (at_once or now - self._reported_at >= REPORT_INTERVAL):
            log.warning(self._event, lines=self._unreported, reason=self._reason)
            self._unreported, self._reported_at = 0, now


class _OpenFile:
    """The file. A thread that writes a batch may outlive the log, where a pipe is full."""

    def __init__(self) -> None:
        self.reopens = True
        self._lock = threading.Lock()  # held by that thread
        self._closes = False
        self._path: Path | None = None
        self._descriptor: int | None = None

    def write(self, target: LogTarget[T], entries: Sequence[T]) -> None:
        """Write a line for each entry. Raises `OSError`."""
        data = memoryview("".join(map(target.format, entries)).encode())
        try:
            with self._lock:
                descriptor = self._opened(target.path)
                while data:
                    data = data[os.write(descriptor, data) :]
        finally:
            if self._closes:
                self.close()

    @property
    def is_written(self) -> bool:
        """Whether a thread writes now."""
        return self._lock.locked()

    def wait(self) -> None:
        """Wait for that thread, but not for a pipe that stays full."""
        if self._lock.acquire(timeout=CLOSING_SECONDS):
            self._lock.release()

    def close(self) -> None:
        """Close the file, now or when it has been written. Called again by the thread then."""
        self._closes = True
        if self._lock.acquire(blocking=False):
            with suppress(OSError):
                self._close()
            self._lock.release()

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _opened(self, path: Path | None) -> int:
        if self._descriptor is not None and (self.reopens or path != self._path or self._was_moved()):
            self._close()
        self.reopens = False
        if self._descriptor is None:
            self._path = path
            if path is None:
                self._descriptor = os.dup(sys.stderr.fileno())
            else:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return self._descriptor

    def _was_moved(self) -> bool:
        """Whether another file has its name now, or none."""
        if self._path is None or self._descriptor is None:
            return False
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return True
        return not os.path.samestat(now, os.fstat(self._descriptor))
