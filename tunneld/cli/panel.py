"""The view of `tunnel expose`: everything about one exposure.

    https://blog.t.example.org/

    local server   127.0.0.1:8000
    relay          relay.example.org:7010   connected since 14:03   round trip 12 ms
    visitors       3 now   40 served   1 failed
    traffic        up 1.2 MiB (3.0 KiB/s)   down 20 MiB (1.1 MiB/s)

    latest visitors             up           down
    203.0.113.5:4242       1.2 KiB         20 MiB   connected for 12s, 1.1 MiB/s
    203.0.113.7:1234         300 B         12 KiB   finished after 2s

    q QR code   Ctrl-C stop

On a low terminal, the lower parts are left out. `q` shows the address as a QR code in place of the latest visitors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from tunneld.agent.events import Activity, Field, LatestVisitor
from tunneld.cli.exposure_state import ExposureState
from tunneld.cli.meter import Meters, RateMeter
from tunneld.cli.qr import qr_lines
from tunneld.cli.styled import BOLD, DIM, GAP, PLAIN, RED, YELLOW, Line, Span, align, join, width, with_text, wrap
from tunneld.policy.units import format_duration, format_size

LABEL = 15
"""Columns of the labels."""
MAX_SHOWN = 10
"""Latest visitors shown: more would push failures out of sight."""
MAX_PEERS = 100
"""Names of visitors of a private tunnel that are remembered."""


class Panel:
    """The state and the lines of one exposure."""

    def __init__(
        self,
        local: str,
        relay: str,
        activity: Callable[[], Activity],
        *,
        keys: bool = False,
        show_code: bool = False,
        colours: bool = False,
    ) -> None:
        """`local` and `relay` are the addresses of both; `keys`: whether keys are read; `show_code`: begin with the QR
        code.
        """
        self.address = ""
        """What visitors use, once the tunnel is open."""
        self._local = local
        self._relay = relay
        self._activity = activity
        self._keys = keys
        self._colours = colours
        self._show_code = show_code
        self._state = ExposureState()
        self._meter = RateMeter()
        self._meters = Meters()  # of the visitors shown
        self._peers: dict[str, str] = {}  # their names, by their addresses, in a private tunnel

    def update(self, event: str, fields: Mapping[str, Field]) -> None:
        """Apply an event of the agent."""
        self._state.update(event, fields)
        if event == "admitted":
            self._peers[str(fields["visitor"])] = str(fields["peer"])
            if len(self._peers) > MAX_PEERS:
                del self._peers[next(iter(self._peers))]

    def on_key(self, key: str) -> None:
        """A key was pressed."""
        if key == "q":
            self._show_code = not self._show_code
        elif key == "escape":
            self._show_code = False

    def lines(self, now: float, size: os.terminal_size) -> list[Line]:
        """See `View`."""
        activity, (columns, height) = self._activity(), size
        head: list[Line] = [[(self.address, BOLD)]] if self.address else []
        facts = list(self._facts(activity, now, columns))
        foot: list[Line] = [join(self._hints(), columns)] if self._keys else []
        room = height - 1 - sum(len(part) + 1 for part in (head, facts, foot))
        if room < 0:
            return [*head, *facts][: max(1, height - 1)]
        body = self._code(columns, room) if self._show_code else self._visitors(activity, now, columns, room)
        return paragraphs([head, facts, body[: max(0, room)], foot])

    def _facts(self, activity: Activity, now: float, columns: int) -> Iterator[Line]:
        stats, state = activity.stats, self._state.describe(now)
        up, down = self._meter.read(now, stats.up, stats.down)
        yield _labelled("local server", [(self._local, PLAIN)], columns)
        if self._state.unhealthy:
            yield from wrap(f"unhealthy: {self._state.unhealthy}", columns, RED, " " * LABEL)
        took = activity.latency if self._state.is_settled else None
        latency = [] if took is None else [(f"round trip {format_milliseconds(took)}", PLAIN)]
        fits = LABEL + width([(self._relay + GAP, PLAIN), state]) <= columns
        yield _labelled("relay", [(self._relay, PLAIN), *([state, *latency] if fits else [])], columns)
        if not fits:
            yield from wrap(state[0], columns, state[1], " " * LABEL)
        failed = [(f"{stats.failed} failed", YELLOW)] if stats.failed else []
        yield _labelled("visitors", [(f"{stats.now} now", PLAIN), (f"{stats.served} served", PLAIN), *failed], columns)
        moved = (("up", stats.up, up), ("down", stats.down, down))
        cells = [(f"{way} {format_size(total)} ({format_size(rate)}/s)", PLAIN) for way, total, rate in moved]
        yield _labelled("traffic", cells, columns)

    def _visitors(self, activity: Activity, now: float, columns: int, room: int) -> list[Line]:
        """A table of the latest visitors, with a heading, in at most `room` lines."""
        shown = activity.latest[: max(0, min(MAX_SHOWN, room - 1))]
        if not shown:
            return []
        rates = self._meters.read(now, shown, lambda one: (one.visitor, one.since), lambda one: (one.up, one.down))
        heading: list[Span] = [("latest visitors", DIM), ("up", DIM), ("down", DIM)]
        rows = align([heading, *(self._cells(one) for one in shown)], columns, right=frozenset({1, 2}))
        texts = [("", DIM), *(_text(one, now, sum(rate)) for one, rate in zip(shown, rates, strict=True))]
        return [with_text(row, text, columns) for row, text in zip(rows, texts, strict=True)]

    def _cells(self, visitor: LatestVisitor) -> list[Span]:
        name = self._peers.get(visitor.visitor, visitor.visitor)
        return [(text, _style(visitor)) for text in (name, format_size(visitor.up), format_size(visitor.down))]

    def _code(self, columns: int, room: int) -> list[Line]:
        """The address as a QR code, or why it is not shown."""
        if not self.address:
            return []
        code = qr_lines(self.address, colours=self._colours)
        if len(code) <= room and width(code[0]) <= columns:
            return code
        needed = f"{width(code[0])} columns and {len(code) + 10} lines"
        return wrap(f"the terminal is too small for the QR code: it takes {needed}", columns, YELLOW)

    def _hints(self) -> list[Span]:
        code = "q hide the QR code" if self._show_code else "q QR code"
        return [(code, DIM), ("Ctrl-C disconnect now" if self._state.is_stopping else "Ctrl-C stop", DIM)]


def paragraphs(parts: Sequence[Sequence[Line]]) -> list[Line]:
    """The parts that have lines, with a blank line between them."""
    blank: Line = [("", PLAIN)]
    lines = [line for part in parts if part for line in (blank, *part)]
    return lines[1:]


def _text(visitor: LatestVisitor, now: float, rate: int) -> Span:
    """The rate and the time of a visitor that is connected, or why it has left."""
    if visitor.left_at is not None:
        return f"{visitor.reason} after {format_duration(int(visitor.left_at - visitor.since))}", _style(visitor)
    return f"{format_size(rate)}/s for {format_duration(int(now - visitor.since))}", _style(visitor)


def _style(visitor: LatestVisitor) -> str:
    return PLAIN if visitor.left_at is None else DIM


def _labelled(label: str, cells: Sequence[Span], columns: int) -> Line:
    """A line of cells behind a label; the last cells for which there is no room are left out."""
    return [(label.ljust(LABEL), DIM), *join(cells, columns - LABEL)]


def format_milliseconds(seconds: float) -> str:
    """`0.3 ms`, `12 ms`, `1500 ms`."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
