"""Loggers for modules that relays and agents share, and whether a stream is the journal.

A relay's messages go to structlog, see daemon/log. An agent has few of them, and importing structlog would take it as
long as importing Trio: it puts a sink of its own in place, see cli/agent_log.py. Modules of the relay alone use
structlog directly.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import TextIO

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Priorities of the journal, sd-daemon(3)."""

Sink = Callable[[str, str, str, Mapping[str, object]], None]
"""Gets each message: the logger's name, the level (`exception`: an error with its traceback), the event, the fields."""


class Logger:
    """A logger with the methods of structlog's that are in use."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, event: str, **fields: object) -> None:
        """Log what happened."""
        _sink(self._name, "info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log what the operator should know."""
        _sink(self._name, "warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log a failure."""
        _sink(self._name, "error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Log a failure with its traceback."""
        _sink(self._name, "exception", event, fields)


def send_to(sink: Sink) -> None:
    """Send all messages of this process to `sink` from now on."""
    global _sink  # noqa: PLW0603 - a process has one log
    _sink = sink


def to_structlog(name: str, level: str, event: str, fields: Mapping[str, object]) -> None:
    """Log with structlog, as it is configured: the sink unless there is another one."""
    import structlog  # noqa: PLC0415 - see above

    getattr(structlog.get_logger(name), level)(event, **fields)


def is_journal(stream: TextIO | None) -> bool:
    """Whether the stream is the systemd journal. $JOURNAL_STREAM has the device and inode of the original stream, since
    the variable is still set after a redirection (systemd.exec(5)).
    """
    descriptor = descriptor_of(stream)
    try:
        status = os.fstat(descriptor) if descriptor is not None else None
    except OSError:
        return False
    return status is not None and os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def descriptor_of(stream: TextIO | None) -> int | None:
    """Return the descriptor of a stream; None if it is closed or in memory."""
    try:
        return stream.fileno() if stream is not None else None
    except (OSError, ValueError, io.UnsupportedOperation):
        return None


_sink: Sink = to_structlog
