"""Logs: one event a line on standard error, for people or as JSON.

    log = structlog.get_logger()
    log = log.bind(tunnel=tunnel.id)                  everything it says from here on carries the tunnel
    log.info("visitor came", visitor=peer)

    12:04:31 info    visitor came             tunnel=t4 visitor=192.0.2.7:51311

Three laws. *One event is one line*: control characters in a value, which may come from a stranger, are escaped, also
those that would move a terminal's cursor or turn the text around. *A log never hurts*: a value that cannot be printed,
a standard error that is closed, full, or read by nobody costs lines (whose number is told afterwards), never the daemon
and never a stall. *A reload applies to everybody*: level and format are looked up at each event, so that a logger
bound long ago follows.

Libraries log through `logging`; from WARNING on they come out here in the same shape, with their name as `logger`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import structlog

from tunneld.daemon.log.lines import Human, Json, Render
from tunneld.daemon.log.sink import Sink

if TYPE_CHECKING:
    from tunneld.config import LogSettings

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class Output:
    """Where lines go, what they look like, and from which level on: changed in place by `configure`."""

    def __init__(self, sink: Sink, render: Render, lowest: int) -> None:
        self.sink = sink
        self.render = render
        self.lowest = lowest
        self._lost = 0

    def emit(self, level: str, event: str, context: MutableMapping[str, Any]) -> None:
        """Write one event, or count it as lost; lines lost before are told first."""
        if self._lost and self.sink.put(self.render("warning", "log lines lost", {"lines": self._lost})):
            self._lost = 0
        if not self.sink.put(self.render(level, event, context)):
            self._lost += 1


_output = Output(Sink(None), Json(), LEVELS["info"])


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Set up logging for the process, or change it: also for every logger that exists.

    Args:
        settings: `format` is `json`, `human`, or `auto`, which is `human` but leaves the time to the systemd journal
            where the stream leads there; `level` is the lowest that is written, except that of what libraries say
            nothing below a warning is.
        stream: where to; `sys.stderr` if None.
    """
    stream = sys.stderr if stream is None else stream
    _output.sink = Sink(stream)
    _output.render = Json() if settings.format == "json" else Human.fitting(stream, journal=settings.format == "auto")
    _output.lowest = LEVELS[settings.level]
    structlog.configure(
        processors=[_drop_below_level, structlog.contextvars.merge_contextvars, _emit],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    _route_libraries(max(_output.lowest, logging.WARNING))


def _drop_below_level(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if LEVELS.get(method, logging.INFO) < _output.lowest:
        raise structlog.DropEvent
    return event


def _emit(_: Any, method: str, event: MutableMapping[str, Any]) -> NoReturn:
    """The end of the line: the event is written here, and nothing is left for structlog to print."""
    _output.emit(method, str(event.pop("event", "")), event)
    raise structlog.DropEvent


class _Libraries(logging.Handler):
    """Takes what libraries say through `logging`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # their arguments do not fit their format, say: not a reason to lose the line
            message = str(record.msg)
        context: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            context["exc_info"] = record.exc_info
        _output.emit(record.levelname.lower(), message, context)


_libraries = _Libraries()


def _route_libraries(lowest: int) -> None:
    root = logging.getLogger()
    if _libraries not in root.handlers:
        root.addHandler(_libraries)
    root.setLevel(lowest)
    logging.captureWarnings(True)
