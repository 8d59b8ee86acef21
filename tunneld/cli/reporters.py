"""The output formats of `tunnel expose` and `tunnel up`.

    standard output              standard error
    address                      one line per event               LineReporter
    address                      errors above a view              TableReporter or PanelReporter, on a terminal
    address                      errors                           QuietReporter
    one JSON object per event                                     JsonReporter

Standard output has only the address, so that `tunnel expose 8000 | read url` gets it. If there are several exposures,
each line begins with the name of its exposure. Lines about failures begin with the time, except in the journal, which
has it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from tunneld.agent.events import Field
from tunneld.cli.board import Board
from tunneld.cli.exposure_table import ExposureTable, Row
from tunneld.cli.panel import Panel
from tunneld.cli.qr import qr_lines
from tunneld.cli.styled import GREEN, PLAIN, RED, YELLOW
from tunneld.cli.tables import json_line
from tunneld.cli.writer import Writer
from tunneld.net.endpoint import Endpoint
from tunneld.policy.units import count, format_size

Clock = Callable[[], str]
FAILURES = frozenset({"broken", "failed", "trouble", "unhealthy", "uncertified", "reconnecting", "ended"})
"""The events that begin with the time."""
STYLES = {"ended": RED, "healthy": GREEN, "resumed": GREEN, "certified": GREEN}
"""On a terminal with colours; other failures are yellow."""


def local_time() -> str:
    """The local time of day."""
    return datetime.now().astimezone().strftime("%H:%M:%S")


class LineReporter:
    """One line per event, for files and pipes."""

    wants_visitors = True

    def __init__(self, out: Writer, err: Writer, scheme: str, name: str = "", *, clock: Clock = local_time) -> None:
        """`name`: the name of the exposure, if there are several. `clock` prints the time; "" for none."""
        self.closed_for = ""
        """The reason of the closing message, once that was printed."""
        self._out = out
        self._err = err
        self._scheme = scheme
        self._name = name
        self._clock = clock

    def report(self, event: str, /, **fields: Field) -> None:
        """Print the address, or the event."""
        if event == "opened":
            address = public_address(str(fields["address"]), self._scheme, str(fields.get("ports", "")))
            self._announce(f"{self._label()}{address}")
        else:
            time = self._clock() if event in FAILURES else ""
            said = " ".join(filter(None, [f"{self._name}:" if self._name else "", sentence(event, fields)]))
            self._notice(time, said, STYLES.get(event, YELLOW if event in FAILURES else PLAIN))
        if event == "closed":
            self.closed_for = str(fields["reason"])

    def _label(self) -> str:
        return f"{self._name}\t" if self._name else ""

    def _announce(self, line: str) -> None:
        self._out.put(line + "\n")

    def _notice(self, time: str, said: str, _style: str) -> None:
        self._err.put(" ".join(filter(None, [time, said])) + "\n")


class CodeReporter(LineReporter):
    """The same, and the address as a QR code as well."""

    def _announce(self, line: str) -> None:
        super()._announce(line)
        self._err.put("\n".join(text for code in qr_lines(line, colours=False) for text, _ in code) + "\n")


class QuietReporter(LineReporter):
    """Only the address and errors; the closing message is not printed, so `closed_for` stays empty."""

    wants_visitors = False

    def report(self, event: str, /, **fields: Field) -> None:
        """Print the address, or the error."""
        if event not in {"closed", "admitted", "connected", "idle"}:
            super().report(event, **fields)


class _LiveReporter(LineReporter):
    """On a terminal: the events that are no failures are only shown by the view."""

    wants_visitors = False

    def __init__(self, out: Writer, board: Board, scheme: str, name: str = "", *, clock: Clock = local_time) -> None:
        super().__init__(out, board.err, scheme, name, clock=clock)
        self._board = board
        self._out_is_terminal = out.is_terminal  # then the address must not be printed into the view

    def _notice(self, time: str, said: str, style: str) -> None:
        self._board.notice(said, style, time=time)


class TableReporter(_LiveReporter):
    """For several exposures: a table at the bottom; addresses and errors are printed above it."""

    def __init__(
        self, out: Writer, board: Board, table: ExposureTable, row: Row, scheme: str, *, clock: Clock = local_time
    ) -> None:
        super().__init__(out, board, scheme, row.name, clock=clock)
        self._table = table
        self._row = row

    def report(self, event: str, /, **fields: Field) -> None:
        """Print what `LineReporter` prints, and update the line of the exposure."""
        if event in {"closed", "ended"}:
            self._table.remove(self._row)
        super().report(event, **fields)
        self._row.update(event, fields)

    def _label(self) -> str:
        return self._table.label(self._name) if self._out_is_terminal else super()._label()

    def _announce(self, line: str) -> None:
        if self._out_is_terminal:
            self._board.notice(line)
        else:
            super()._announce(line)


class PanelReporter(_LiveReporter):
    """For one exposure: the panel shows its address; errors are printed above."""

    def __init__(self, out: Writer, board: Board, panel: Panel, scheme: str, *, clock: Clock = local_time) -> None:
        super().__init__(out, board, scheme, clock=clock)
        self._panel = panel

    def report(self, event: str, /, **fields: Field) -> None:
        """Print what `LineReporter` prints, and update the panel."""
        self._panel.update(event, fields)
        super().report(event, **fields)
        if event == "closed":
            self._board.view = None
        self._board.redraw()

    def _announce(self, line: str) -> None:
        former, self._panel.address = self._panel.address, line
        if not self._out_is_terminal:
            super()._announce(line)
        elif former and former != line:
            self._notice(self._clock(), f"the address has changed: {former} is now {line}", YELLOW)


class JsonReporter:
    """For programs: every event on standard output, one JSON object per line."""

    wants_visitors = True

    def __init__(self, out: Writer, scheme: str, name: str = "") -> None:
        """`name`: the name of the exposure, if there are several."""
        self._out = out
        self._scheme = scheme
        self._exposure = {"exposure": name} if name else {}

    def report(self, event: str, /, **fields: Field) -> None:
        """Print one object with `time`, `event`, `exposure` if there are several, and the fields of the event."""
        if event == "opened":
            fields["address"] = public_address(str(fields["address"]), self._scheme, str(fields.get("ports", "")))
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._out.put(json_line({"time": time, "event": event, **self._exposure, **fields}))


def public_address(client_uri: str, scheme: str, ports: str = "") -> str:
    """Format the public address: the client URI, or `http://HOST:PORT/`; with several ports `tcp://HOST:20000-20010`."""
    if ports:
        return f"{scheme}://{Endpoint.parse(client_uri).authority.rpartition(':')[0]}:{ports}"
    return client_uri if scheme == "tcp" else f"{scheme}://{Endpoint.parse(client_uri).authority}/"


SENTENCES = {
    "visitor": "visitor {visitor}",
    "visiting": "client {visitor}: visiting {peer} ({id}), end-to-end: yes",
    "admitted": "visitor {visitor} is {peer} ({id}), end-to-end: yes",
    "connected": "connected to {peer} ({id}), end-to-end: yes",
    "idle": "no connection for {seconds:g} s: the session with {peer} has ended",
    "broken": "the session with {peer} was broken on its way: {reason}",
    "left": "left {visitor} up={up} down={down}: {reason}",
    "inspecting": "inspector: {url}",
    "resumed": "reconnected: tunnel {id} is still open",
    "unhealthy": "the local server is unhealthy: {reason}",
    "healthy": "the local server is healthy again",
    "certified": "the certificate for {host} is there; its key stays on this machine",
    "uncertified": "{reason}; check that the name leads to the relay, and that its ports for host names are reached as "
    "80 and 443; it is tried again",
    "ended": "failed permanently: {reason}",
    "reconnecting": "reconnecting in {delay:g} s: {reason}",
}
"""The events with a fixed form."""


def sentence(event: str, fields: dict[str, Field]) -> str:
    """Format an event as a line for people and for grep."""
    if event in SENTENCES:
        return SENTENCES[event].format_map(fields)
    match event:
        case "failed":
            return f"visitor {fields['visitor']}: {fields['reason']}{more(fields)}"
        case "trouble":
            return f"{fields['reason']}{more(fields)}"
        case "draining":
            hint = f"; press Ctrl-C again to disconnect now ({fields['delay']:g} s)" if "delay" in fields else ""
            return f"stopping: {count(int(fields['visitors']), 'visitor')} still connected{hint}"
        case _:
            failed = f", {fields['failed']} failed" if fields["failed"] else ""
            up, down = (format_size(int(fields[key])) for key in ("up", "down"))
            visitors = count(int(fields["served"]), "visitor")
            return f"closed: {fields['reason']}; {visitors} served{failed}, {up} up, {down} down"


def more(fields: dict[str, Field]) -> str:
    """Format how many events with the same reason were suppressed."""
    return f" (and {fields['repeated']} more)" if fields["repeated"] else ""
