"""The four ways in which `tunnel expose` talks.

    standard output                      standard error
    the address                          events, a line each              Lines
    the address                          failures above a live line       Live    where that is a terminal
    the address                          failures                         Quiet
    everything, as JSON lines                                             JsonLines

Standard output has the address alone, so that `read url` behind a pipe gets it and may leave.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime

import trio

from tunneld.agent.events import Field, Figures
from tunneld.cli.tables import octets
from tunneld.cli.writer import Writer
from tunneld.endpoint import Endpoint

REDRAW = 0.5
"""Seconds between two looks of the live line."""
CLEAR = "\r\x1b[K"
"""To the first column, and erase the line."""


class Lines:
    """For files and pipes."""

    visits = True

    def __init__(self, out: Writer, err: Writer, scheme: str) -> None:
        self._out = out
        self._err = err
        self._scheme = scheme

    def tell(self, event: str, /, **fields: Field) -> None:
        """Print the address, or the event."""
        if event == "opened":
            self._out.put(public_address(str(fields["address"]), self._scheme) + "\n")
        else:
            self._notice(sentence(event, fields))

    def _notice(self, line: str) -> None:
        self._err.put(line + "\n")


class Quiet(Lines):
    """Only what goes wrong."""

    visits = False

    def tell(self, event: str, /, **fields: Field) -> None:
        """Print the address, or what went wrong."""
        if event != "closed":
            super().tell(event, **fields)


class Live(Lines):
    """For terminals: a line at the bottom that changes."""

    visits = False

    def _notice(self, line: str) -> None:
        self._err.put(f"{CLEAR}{line}\n")

    async def run(self, figures: Callable[[], Figures]) -> None:
        """Redraw until cancelled, then leave the cursor on a line of its own."""
        drawn, before = "", figures()
        try:
            while True:
                now = figures()
                line = live_line(now, before, REDRAW)[: shutil.get_terminal_size().columns - 1]
                if line != drawn:
                    self._err.put(CLEAR + line)
                drawn, before = line, now
                await trio.sleep(REDRAW)
        finally:
            self._err.put(CLEAR)


class JsonLines:
    """For programs: everything on standard output, one object a line."""

    visits = True

    def __init__(self, out: Writer, scheme: str) -> None:
        self._out = out
        self._scheme = scheme

    def tell(self, event: str, /, **fields: Field) -> None:
        """Print one object: `time`, `event`, and what belongs to it."""
        if event == "opened":
            fields["address"] = public_address(str(fields["address"]), self._scheme)
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._out.put(json.dumps({"time": time, "event": event, **fields}, ensure_ascii=False) + "\n")


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
        case "reconnecting":
            return f"reconnecting in {fields['delay']:g} s: {fields['reason']}"
        case _:
            counts = " ".join(f"{key}={fields[key]}" for key in ("served", "failed", "up", "down"))
            return f"closed: {fields['reason']}, {counts}"


def more(fields: dict[str, Field]) -> str:
    """How often the same was kept back."""
    return f" (and {fields['repeated']} more)" if fields["repeated"] else ""


def live_line(now: Figures, before: Figures, interval: float) -> str:
    """`3 visitors now, 40 served   up 1.2 MiB (3 KiB/s)   down 20 MiB (1.1 MiB/s)   8 parked`."""
    failed = f", {now.failed} failed" if now.failed else ""
    up, down = (int(max(0, new - old) / interval) for new, old in ((now.up, before.up), (now.down, before.down)))
    return (
        f"{now.now} visitor{'' if now.now == 1 else 's'} now, {now.served} served{failed}"
        f"   up {octets(now.up)} ({octets(up)}/s)   down {octets(now.down)} ({octets(down)}/s)   {now.parked} parked"
    )
