"""The formats of a log line: level, event and context become text without a newline. Pure but for the clock."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from tunneld.log import PRIORITIES, is_journal

Render = Callable[[str, str, Mapping[str, Any]], str]

EVENT_WIDTH = 24
"""Columns for the event; most are shorter, so the contexts are aligned."""
COLOURS = {"debug": "\x1b[2m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
RESET_COLOUR = "\x1b[0m"
SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True, slots=True)
class Json:
    """`{"time": "2026-02-03T12:04:31.482Z", "level": "info", "event": "tunnel opened", "tunnel": "t4", ...}`"""

    def __call__(self, level: str, event: str, context: Mapping[str, Any]) -> str:
        line: dict[str, Any] = {"time": _iso_time(), "level": level, "event": event}
        for key, value in context.items():
            if key != "exc_info":
                line.setdefault(str(key), value)
        if error := _exception(context):
            line["exception"] = "".join(traceback.format_exception(error))
        try:
            return json.dumps(line, default=text, allow_nan=False)
        except (TypeError, ValueError, RecursionError):  # NaN, an odd key in a mapping, a list within itself
            return json.dumps({key: text(value) for key, value in line.items()})


@dataclass(frozen=True, slots=True)
class Human:
    """`12:04:31 info    tunnel opened            tunnel=t4 backend=tcp`"""

    time: Callable[[], str] | None
    colours: bool = False
    priorities: bool = False

    @classmethod
    def fitting(cls, stream: TextIO | None, *, journal: bool) -> Human:
        """Choose local time and colours for a terminal, priorities and no time for the journal, and UTC otherwise."""
        if journal and is_journal(stream):
            return cls(time=None, priorities=True)
        if stream is not None and not stream.closed and stream.isatty():
            plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
            return cls(time=_short_time, colours=not plain)
        return cls(time=_iso_time)

    def __call__(self, level: str, event: str, context: Mapping[str, Any]) -> str:
        pairs = [f"{escape(str(key))}={_shown(value)}" for key, value in context.items() if key != "exc_info"]
        if error := _exception(context):
            pairs.append(f"exception={_shown(brief(error))}")
        parts = [self._level(level), escape(event).ljust(EVENT_WIDTH if pairs else 0), *pairs]
        if self.time is not None:
            parts.insert(0, self.time())
        return (f"<{PRIORITIES.get(level, 6)}>" if self.priorities else "") + " ".join(parts)

    def _level(self, level: str) -> str:
        colour = COLOURS.get(level) if self.colours else None
        return f"{colour}{level:<7}{RESET_COLOUR}" if colour else f"{level:<7}"


def text(value: object) -> str:
    """Convert any value to text. Never raises."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if math.isfinite(value):
            return f"{value:.6g}"
        case None:
            return "-"
        case BaseException():
            return brief(value) if isinstance(value, BaseExceptionGroup) else _safely(value) or type(value).__name__
        case _:
            return _safely(value)


def escape(line: str) -> str:
    r"""Escape characters that do not print (controls, line separators, direction marks): `\n`, `\x1b`, `\u202e`."""
    return line if line.isprintable() else "".join(map(_escaped, line))


def brief(error: BaseException) -> str:
    """Format a traceback on one line, innermost last: `server.py:88 serve > lines.py:31 parse: ValueError: no verb`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    what = f"{type(error).__name__}: {_safely(error)}"
    if isinstance(error, BaseExceptionGroup):
        what += " [" + "; ".join(brief(inner) for inner in error.exceptions) + "]"
    if error.__cause__ is not None:
        what += f" (from {brief(error.__cause__)})"
    return f"{where}: {what}" if where else what


def _shown(value: object) -> str:
    """Format a value after its `=`, in quotes if it is empty or has characters that make its end ambiguous."""
    shown = text(value)
    if shown and shown.isprintable() and not any(character in shown for character in ' "='):
        return shown
    return '"' + escape(shown.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if character in SHORT_ESCAPES:
        return SHORT_ESCAPES[character]
    code = ord(character)
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _safely(value: object) -> str:
    try:
        return str(value)
    except Exception:  # `__str__` can raise anything
        return f"<a {type(value).__name__} that cannot be printed>"


def _exception(context: Mapping[str, Any]) -> BaseException | None:
    """Return the exception of `exc_info`: an exception, the tuple of `sys.exc_info`, or True for the current one."""
    match context.get("exc_info"):
        case BaseException() as error:
            return error
        case (_, BaseException() as error, _):
            return error
        case True:
            return sys.exc_info()[1]
        case _:
            return None


def _iso_time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _short_time() -> str:
    return datetime.now().astimezone().strftime("%H:%M:%S")
