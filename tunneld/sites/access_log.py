"""The access log: one line for each request to a host name, in a file of its own or on standard error.

    text    2026-11-30T17:04:23.120Z 192.0.2.7 blog.t.example.org "GET /a" 200 up=0 down=5120 ms=12.3 tunnel=t4 id=9f2c
    json    the same facts as an object

A connection only appends to a list. A task formats and writes what has gathered in a thread, so neither a slow disk nor
a full pipe stops the relay; lines that do not fit the list meanwhile are lost, and counted. While the log is off, there
is no object and no call for a request.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

import structlog
import trio

from tunneld.errors import reason_of
from tunneld.sites.fields import Origin
from tunneld.sites.site import Request

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

Format = Literal["off", "text", "json"]

MAX_LINES = 16_384
"""Lines that wait for a slow disk, at about 1 KiB each."""

CLOSING_SECONDS = 1.0
"""For the last lines, when the relay stops."""


class AccessLogSettings(Protocol):
    """What the log reads of `[names]`."""

    @property
    def access_log(self) -> Format: ...
    @property
    def access_log_file(self) -> Path | None: ...
    @property
    def access_log_query(self) -> bool: ...


@dataclass(slots=True)
class AccessRecord:
    """One request, while it is under way and until its line is written."""

    client: str
    request: Request | None  # None: its head could not be read
    began_at: float  # by `time.perf_counter`
    tunnel: str = ""
    status: int = 0  # 0: there was no response
    up: int = 0  # bytes of the body, and of the stream after an upgrade
    down: int = 0
    ended_at: float = 0.0  # seconds since 1970
    seconds: float = 0.0

    def facts(self, *, with_query: bool) -> dict[str, object]:
        """The facts of the line."""
        request, head = self.request, self.request.head if self.request is not None else None
        when = datetime.fromtimestamp(self.ended_at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "time": when,
            "client": self.client,
            "host": head.host if head else "",
            "method": head.method.decode("latin-1") if head else "",
            "path": (head.target if with_query else head.path).decode("latin-1") if head else "",
            "status": self.status,
            "up": self.up,
            "down": self.down,
            "ms": round(self.seconds * 1000, 1),
            "tunnel": self.tunnel,
            "id": request.identity.decode("latin-1") if request else "",
        }


class AccessLog:
    """Writes the lines. `begin` returns None while the log is off."""

    def __init__(self, settings: Callable[[], AccessLogSettings]) -> None:
        self._settings = settings
        self._records: list[AccessRecord] = []
        self._lost = 0
        self._wake = trio.Event()
        self._file: int | None = None  # opened for the first line
        self._path: Path | None = None
        self._reopens = False

    @property
    def is_on(self) -> bool:
        """Whether requests are logged."""
        return self._settings().access_log != "off"

    def begin(self, origin: Origin, request: Request | None) -> AccessRecord:
        """A request has arrived."""
        client = request.client[0] if request is not None else origin.address
        return AccessRecord(client, request, time.perf_counter())

    def end(self, record: AccessRecord) -> None:
        """Its response is complete, or the connection has ended."""
        if len(self._records) >= MAX_LINES:
            self._lost += 1
            return
        record.seconds, record.ended_at = time.perf_counter() - record.began_at, time.time()
        self._records.append(record)
        self._wake.set()

    def reopen(self) -> None:
        """Open the file again before the next line: the former one was renamed, or the setting has changed."""
        self._reopens = True

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write lines until cancelled."""
        task_status.started()
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                await self._write()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSING_SECONDS):
                await self._write()
            self._close()

    async def _write(self) -> None:
        """Write what has gathered."""
        records, self._records = self._records, []
        lost, self._lost = self._lost, 0
        if lost:
            log.warning("access log lost lines", lines=lost, reason="the disk or the reader is too slow")
        settings = self._settings()
        if not records or settings.access_log == "off":
            return
        try:
            batch = _Batch(
                self._open(settings.access_log_file), records, settings.access_log, settings.access_log_query
            )
            try:
                await trio.to_thread.run_sync(batch.write, abandon_on_cancel=True)
            finally:
                batch.close_unless_begun()
        except OSError as error:
            self._reopens = True
            log.warning("access log lost lines", lines=len(records), reason=reason_of(error))

    def _open(self, path: Path | None) -> int:
        if self._file is None or self._reopens or path != self._path:
            self._close()
            self._path, self._reopens = path, False
            if path is None:
                self._file = os.dup(sys.stderr.fileno())
            else:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def format_line(record: AccessRecord, form: Format, *, with_query: bool) -> str:
    """One line. The path has no control characters, but may have quotes."""
    facts = record.facts(with_query=with_query)
    if form == "json":
        return json.dumps(facts) + "\n"
    shown = str(facts["path"]).replace('"', "%22").encode("ascii", "backslashreplace").decode()
    head = f'{facts["time"]} {facts["client"]} {facts["host"] or "-"} "{facts["method"]} {shown}" {record.status}'
    rest = " ".join(f"{key}={facts[key] or '-'}" for key in ("tunnel", "id"))
    return f"{head} up={record.up} down={record.down} ms={facts['ms']} {rest}\n"


class _Batch:
    """Lines that a thread writes. It has a descriptor of its own, for it may outlive the log where a pipe is full."""

    def __init__(self, descriptor: int, records: Sequence[AccessRecord], form: Format, with_query: bool) -> None:
        self._descriptor = os.dup(descriptor)
        self._records = records
        self._form: Format = form
        self._with_query = with_query
        self._has_begun = False

    def write(self) -> None:
        """Runs in the thread. Raises OSError."""
        self._has_begun = True
        try:
            lines = [format_line(record, self._form, with_query=self._with_query) for record in self._records]
            data = memoryview("".join(lines).encode())
            while data:
                data = data[os.write(self._descriptor, data) :]
        finally:
            os.close(self._descriptor)

    def close_unless_begun(self) -> None:
        """The thread has ended, or never began."""
        if not self._has_begun:
            os.close(self._descriptor)
