"""The log of an agent: warnings and errors of the engine and the carriers, as lines on standard error."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime

from tunneld.cli.common import complain, printable

LEVELS = {"warning": "warning", "error": "error", "exception": "error"}
"""What is printed, and as what; users of the agent need no lower levels."""
REPORTED = "acme"
"""The logger whose warnings are reported as events, too."""


def print_line(logger: str, level: str, event: str, fields: Mapping[str, object]) -> None:
    """Print a message, which may contain text from a peer; the sink of `tunneld.log`."""
    if level not in LEVELS or (logger == REPORTED and level == "warning"):
        return
    named = dict(fields)
    error = named.pop("exc_info", None)
    time = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    words = " ".join([event, *(f"{key}={value}" for key, value in named.items())])
    complain("\n".join([printable(f"{time} {LEVELS[level]}: {words}"), *_traceback(error, level)]))


def _traceback(error: object, level: str) -> Iterator[str]:
    if isinstance(error, BaseException):
        yield "".join(traceback.format_exception(error)).rstrip()
    elif level == "exception":
        yield traceback.format_exc().rstrip()
