"""The access log: one line for each request to a host name, in a file of its own or on standard error.

    text    2026-11-30T17:04:23.120Z 192.0.2.7 blog.t.example.org "GET /a" 200 up=0 down=5120 ms=12.3 tunnel=t4 id=9f2c
    json    the same facts as an object

A connection only appends to a list, see line_log.py. While the log is off, there is no object and no call for a
request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from tunneld.line_log import LineLog, LogTarget
from tunneld.sites.fields import Origin
from tunneld.sites.site import Request

Format = Literal["off", "text", "json"]


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


class AccessLog(LineLog[AccessRecord]):
    """Writes the lines. While `is_on` is false, it has nothing to do with requests."""

    def __init__(self, settings: Callable[[], AccessLogSettings]) -> None:
        self._settings = settings
        super().__init__("access log", self._current_target)

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
        record.seconds, record.ended_at = time.perf_counter() - record.began_at, time.time()
        self.put(record)

    def _current_target(self) -> LogTarget[AccessRecord] | None:
        settings = self._settings()
        if settings.access_log == "off":
            return None
        line = partial(format_line, form=settings.access_log, with_query=settings.access_log_query)
        return LogTarget(settings.access_log_file, line)


def format_line(record: AccessRecord, form: Format, *, with_query: bool) -> str:
    """One line. The path has no control characters, but may have quotes."""
    facts = record.facts(with_query=with_query)
    if form == "json":
        return json.dumps(facts) + "\n"
    shown = str(facts["path"]).replace('"', "%22").encode("ascii", "backslashreplace").decode()
    head = f'{facts["time"]} {facts["client"]} {facts["host"] or "-"} "{facts["method"]} {shown}" {record.status}'
    rest = " ".join(f"{key}={facts[key] or '-'}" for key in ("tunnel", "id"))
    return f"{head} up={record.up} down={record.down} ms={facts['ms']} {rest}\n"
