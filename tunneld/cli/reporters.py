"""The four ways in which `tunnel expose` and `tunnel up` talk.

    standard output                      standard error
    the address                          events, a line each              Lines
    the address                          failures above live lines        Live    where that is a terminal: see board.py
    the address                          failures                         Quiet
    everything, as JSON lines                                             JsonLines

Standard output has the address alone, so that `read url` behind a pipe gets it and may leave. Where there are several
exposures, each line begins with the name of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime

from tunneld.agent.events import Field, Stats
from tunneld.cli.board import Board, Writer
from tunneld.net.endpoint import Endpoint


class LineReporter:
    """For files and pipes."""

    wants_visitors = True

    def __init__(self, out: Writer, err: Writer, scheme: str, name: str = "") -> None:
        """`name`: of one of several exposures."""
        self._out = out
        self._err = err
        self._scheme = scheme
        self._name = name

    def report(self, event: str, /, **fields: Field) -> None:
        """Print the address, or the event."""
        if event == "opened":
            name = f"{self._name}\t" if self._name else ""
            self._announce(f"{name}{public_address(str(fields['address']), self._scheme)}")
        else:
            self._notice((f"{self._name}: " if self._name else "") + sentence(event, fields))

    def _announce(self, line: str) -> None:
        self._out.put(line + "\n")

    def _notice(self, line: str) -> None:
        self._err.put(line + "\n")


class QuietReporter(LineReporter):
    """Only what goes wrong."""

    wants_visitors = False

    def report(self, event: str, /, **fields: Field) -> None:
        """Print the address, or what went wrong."""
        if event != "closed":
            super().report(event, **fields)


class LiveReporter(LineReporter):
    """For terminals: a line at the bottom that changes."""

    wants_visitors = False

    def __init__(
        self, out: Writer, board: Board, scheme: str, name: str = "", *, figures: Callable[[], Stats] = Stats
    ) -> None:
        super().__init__(out, board.err, scheme, name)
        self._board = board
        self._row = board.add(name, figures)
        self._one_terminal = out.is_terminal  # the live lines must make room for what goes to standard output

    def report(self, event: str, /, **fields: Field) -> None:
        """Print what `LineReporter` does, and keep the row true."""
        if event in {"closed", "ended"}:
            self._board.remove(self._row)
        super().report(event, **fields)
        self._row.update(event, fields)

    def _announce(self, line: str) -> None:
        if self._one_terminal:
            self._board.notice(line)
        else:
            super()._announce(line)

    def _notice(self, line: str) -> None:
        self._board.notice(line)


class JsonReporter:
    """For programs: everything on standard output, one object a line."""

    wants_visitors = True

    def __init__(self, out: Writer, scheme: str, name: str = "") -> None:
        """`name`: of one of several exposures."""
        self._out = out
        self._scheme = scheme
        self._whose = {"exposure": name} if name else {}

    def report(self, event: str, /, **fields: Field) -> None:
        """Print one object: `time`, `event`, of several exposures `exposure`, and what belongs to the event."""
        if event == "opened":
            fields["address"] = public_address(str(fields["address"]), self._scheme)
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._out.put(json.dumps({"time": time, "event": event, **self._whose, **fields}, ensure_ascii=False) + "\n")


def public_address(client_uri: str, scheme: str) -> str:
    """What to tell the world: the client URI, or `http://HOST:PORT/`."""
    return client_uri if scheme == "tcp" else f"{scheme}://{Endpoint.parse(client_uri).authority}/"


def sentence(event: str, fields: dict[str, Field]) -> str:
    """An event as a line for people and for grep."""
    match event:
        case "visitor":
            return f"visitor {fields['visitor']}"
        case "left":
            return f"left {fields['visitor']} up={fields['up']} down={fields['down']}: {fields['reason']}"
        case "failed":
            return f"visitor {fields['visitor']}: {fields['reason']}{more(fields)}"
        case "trouble":
            return f"{fields['reason']}{more(fields)}"
        case "resumed":
            return f"reconnected: tunnel {fields['id']} is still open"
        case "unhealthy":
            return f"the local server is unhealthy: {fields['reason']}"
        case "healthy":
            return "the local server is healthy again"
        case "draining":
            visitors = f"{fields['visitors']} visitor{'' if fields['visitors'] == 1 else 's'}"
            cut = f", cut in {fields['delay']:g} s or when told again" if "delay" in fields else ""
            return f"ending: {visitors} left{cut}"
        case "ended":
            return f"failed for good: {fields['reason']}"
        case "reconnecting":
            return f"reconnecting in {fields['delay']:g} s: {fields['reason']}"
        case _:
            counts = " ".join(f"{key}={fields[key]}" for key in ("served", "failed", "up", "down"))
            return f"closed: {fields['reason']}, {counts}"


def more(fields: dict[str, Field]) -> str:
    """How often the same was kept back."""
    return f" (and {fields['repeated']} more)" if fields["repeated"] else ""
