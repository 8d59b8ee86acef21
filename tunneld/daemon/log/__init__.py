"""Logs: one event per line on standard error, as text for people or as JSON.

    log = structlog.get_logger()
    log = log.bind(tunnel=tunnel.id)                  all further events of this logger have the tunnel
    log.info("visitor connected", visitor=peer)

    12:04:31 info    visitor connected        tunnel=t4 visitor=192.0.2.7:51311

Three guarantees:

- One event is one line. Control characters in a value, which may come from an unauthenticated peer, are escaped,
  including those that move the cursor of a terminal or change the direction of text.
- Logging never raises and never blocks. If a value cannot be printed, or standard error is closed, full or not being
  read, lines are lost, and their number is logged as soon as that is possible.
- A reload applies to every logger, however old: level and format are looked up at each event.

Libraries log through `logging`. Their events from WARNING up are written here in the same format, with their name as
`logger`.
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
    """The destination, format and lowest level of the log. `configure` changes it in place."""

    def __init__(self, sink: Sink, render: Render, lowest: int) -> None:
        self.sink = sink
        self.render = render
        self.lowest = lowest
        self._lost = 0

    def emit(self, level: str, event: str, context: MutableMapping[str, Any]) -> None:
        """Write one event, or count it as lost. First report lines that were lost before."""
        if self._lost and self.sink.put(self.render("warning", "log lines lost", {"lines": self._lost})):
            self._lost = 0
        if not self.sink.put(self.render(level, event, context)):
            self._lost += 1


_output = Output(Sink(None), Json(), LEVELS["info"])


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Set up logging for the process, or change it, for existing loggers as well.

    Args:
        settings: `format` is `json`, `human`, or `auto`, which is `human` without the time if the stream is the systemd
            journal; `level` is the lowest to write, but at least `warning` for libraries.
        stream: the destination; `sys.stderr` if None.
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
    """Write the event. This is the last processor, so structlog has nothing left to print."""
    _output.emit(method, str(event.pop("event", "")), event)
    raise structlog.DropEvent


class _Libraries(logging.Handler):
    """Writes what libraries log through `logging`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # the arguments do not match the format, for example; the line is worth keeping
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
