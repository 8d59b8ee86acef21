"""The output formats of `tunnel expose`, and that a reader that stalls cannot stop the agent."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
import trio

from tunneld.agent.events import Activity
from tunneld.cli.board import Board
from tunneld.cli.exposure_table import ExposureTable
from tunneld.cli.panel import Panel
from tunneld.cli.qr import qr_code
from tunneld.cli.reporters import (
    CodeReporter,
    JsonReporter,
    LineReporter,
    PanelReporter,
    QuietReporter,
    TableReporter,
    public_address,
)
from tunneld.cli.styled import render
from tunneld.cli.writer import Writer

ADDRESS = "tcp://192.0.2.1:20000"
OPENED = {"address": ADDRESS, "uri": "tcp://192.0.2.1:20001", "id": "t1"}
FAILED = {"visitor": "203.0.113.5:4242", "reason": "could not connect to 127.0.0.1:8000: connection refused"}


class Memory(Writer):
    """A writer that keeps its lines in memory."""

    def __init__(self) -> None:
        super().__init__(-1, vital=False)

    @property
    def text(self) -> str:
        return "".join(self._lines)


def noon() -> str:
    return "12:00:00"


def test_standard_output_has_only_the_address() -> None:
    out, err = Memory(), Memory()
    lines = LineReporter(out, err, "http", clock=noon)
    lines.report("opened", **OPENED)
    lines.report("visitor", visitor="203.0.113.5:4242")
    lines.report("left", visitor="203.0.113.5:4242", up=1, down=2, reason="finished")
    lines.report("failed", **FAILED, repeated=0)
    lines.report("failed", **FAILED, repeated=12)
    lines.report("reconnecting", reason="control connection to relay lost", delay=2.0)
    lines.report("closed", reason="told to stop", served=1, failed=13, up=1, down=2048)
    assert out.text == "http://192.0.2.1:20000/\n"
    assert err.text.splitlines() == [
        "visitor 203.0.113.5:4242",
        "left 203.0.113.5:4242 up=1 down=2: finished",
        "12:00:00 visitor 203.0.113.5:4242: could not connect to 127.0.0.1:8000: connection refused",
        "12:00:00 visitor 203.0.113.5:4242: could not connect to 127.0.0.1:8000: connection refused (and 12 more)",
        "12:00:00 reconnecting in 2 s: control connection to relay lost",
        "closed: told to stop; 1 visitor served, 13 failed, 1 B up, 2.0 KiB down",
    ]


def test_failures_have_no_time_of_their_own_in_the_journal() -> None:
    err = Memory()
    LineReporter(Memory(), err, "tcp", clock=str).report("unhealthy", reason="no answer in 5 s")
    LineReporter(Memory(), err, "tcp").report("unhealthy", reason="no answer in 5 s")
    journal, other = err.text.splitlines()
    assert journal == "the local server is unhealthy: no answer in 5 s"
    assert re.fullmatch(r"\d\d:\d\d:\d\d " + journal, other)


def test_json_lines_parse_and_carry_the_time() -> None:
    out = Memory()
    JsonReporter(out, "https").report("opened", **OPENED)
    record = json.loads(out.text)
    assert record.pop("time").endswith("+00:00")
    assert record == {"event": "opened", **OPENED, "address": "https://192.0.2.1:20000/"}


def test_quiet_prints_errors_but_not_the_end() -> None:
    out, err = Memory(), Memory()
    quiet = QuietReporter(out, err, "tcp")
    quiet.report("opened", **OPENED)
    quiet.report("failed", **FAILED, repeated=0)
    quiet.report("closed", reason="told to stop", served=0, failed=1, up=0, down=0)
    assert (out.text, err.text.count("\n")) == (ADDRESS + "\n", 1)


def test_with_several_exposures_every_line_begins_with_a_name() -> None:
    out, err = Memory(), Memory()
    lines = LineReporter(out, err, "http", "blog", clock=noon)
    lines.report("opened", **OPENED)
    lines.report("unhealthy", reason="no answer in 5 s")
    lines.report("ended", reason="the relay refused the credential 'bob'")
    JsonReporter(out, "tcp", "blog").report("healthy")
    address, healthy = out.text.splitlines()
    assert address == "blog\thttp://192.0.2.1:20000/"
    assert json.loads(healthy)["exposure"] == "blog"
    assert err.text.splitlines() == [
        "12:00:00 blog: the local server is unhealthy: no answer in 5 s",
        "12:00:00 blog: failed permanently: the relay refused the credential 'bob'",
    ]


# On a terminal


class Terminal(Memory):
    """A writer that claims to be a terminal."""

    is_terminal = True


def test_addresses_on_a_terminal_are_aligned() -> None:
    out, err, table = Terminal(), Terminal(), ExposureTable()
    rows = [table.add(name, Activity) for name in ("blog", "a-longer-name")]
    for row in rows:
        TableReporter(out, Board(err), table, row, "http").report("opened", **OPENED)
    assert err.text.splitlines() == [
        "blog            http://192.0.2.1:20000/",
        "a-longer-name   http://192.0.2.1:20000/",
    ]


def test_the_panel_shows_the_address_unless_standard_output_goes_elsewhere() -> None:
    for out, printed in ((Terminal(), ""), (Memory(), "http://192.0.2.1:20000/\n")):
        err, panel = Terminal(), Panel("127.0.0.1:8000", "192.0.2.1:7010", Activity)
        PanelReporter(out, Board(err), panel, "http").report("opened", **OPENED)
        assert (out.text, err.text, panel.address) == (printed, "", "http://192.0.2.1:20000/")


def test_a_changed_address_is_reported() -> None:
    err = Terminal()
    live = PanelReporter(Terminal(), Board(err), Panel("8000", "relay", Activity), "tcp", clock=noon)
    live.report("opened", **OPENED)
    live.report("opened", **OPENED)
    live.report("opened", **{**OPENED, "address": "tcp://192.0.2.1:20002"})
    assert err.text == f"12:00:00 the address has changed: {ADDRESS} is now tcp://192.0.2.1:20002\n"


async def test_failures_have_colours_and_the_time_is_dim() -> None:
    err = Terminal()
    live = PanelReporter(Terminal(), Board(err, colours=True), Panel("8000", "relay", Activity), "tcp", clock=noon)
    live.report("reconnecting", reason="lost", delay=2.0)
    live.report("ended", reason="refused")
    assert err.text.splitlines() == [
        "\x1b[2m12:00:00 \x1b[m\x1b[33mreconnecting in 2 s: lost\x1b[m",
        "\x1b[2m12:00:00 \x1b[m\x1b[31mfailed permanently: refused\x1b[m",
    ]


async def test_a_replaced_exposure_keeps_its_line_until_its_last_visitor_has_left() -> None:
    err, table = Terminal(), ExposureTable()
    board = Board(err)
    former = TableReporter(Memory(), board, table, table.add("blog", Activity), "tcp")
    former.report("draining", id="t1", visitors=1, delay=30.0)
    successor = TableReporter(Memory(), board, table, table.add("blog", Activity), "tcp")
    assert [line[:14] for line in table_text(table)] == ["blog   stoppin", "blog   connect"]
    former.report("closed", id="t1", reason="wanted in another way", served=1, failed=0, up=0, down=0)
    successor.report("reconnecting", reason="lost", delay=4.0)
    assert table_text(table) == ["blog   reconnecting in 4 s: lost"]


def table_text(table: ExposureTable) -> list[str]:
    """The lines of a table, without styles."""
    lines = table.lines(trio.current_time(), os.terminal_size((80, 25)))
    return [render(line, colours=False).rstrip() for line in lines]


def test_the_code_of_an_address_is_printed_where_lines_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Memory(), Memory()
    CodeReporter(out, err, "http").report("opened", **OPENED)
    assert out.text == "http://192.0.2.1:20000/\n"
    assert set(err.text) == set("█▀▄ \n")
    monkeypatch.setitem(sys.modules, "segno", None)
    qr_code.cache_clear()
    CodeReporter(out, err := Memory(), "http").report("opened", **OPENED)
    assert err.text == "no QR code: the Python module segno is not installed; pip install segno\n"


def test_an_ipv6_address_keeps_its_brackets() -> None:
    assert public_address("tcp://[2001:db8::1]:80", "http") == "http://[2001:db8::1]:80/"


@pytest.mark.parametrize(("kind", "shown"), [(LineReporter, True), (QuietReporter, False)])
async def test_both_ends_of_a_private_tunnel_say_that_it_is_end_to_end(kind: type[LineReporter], shown: bool) -> None:
    read, write = os.pipe()
    async with Writer(write, vital=False).open() as out:
        reporter = kind(out, out, "tcp")
        reporter.report("admitted", visitor="192.0.2.7:4242", peer="bob", id="AAECAwQFBgcICQoLDA0ODxAREhM")
        reporter.report("ended", reason="over")
    os.close(write)
    said = os.read(read, 1000).decode()
    os.close(read)
    assert ("visitor 192.0.2.7:4242 is bob (AAECAwQFBgcICQoLDA0ODxAREhM), end-to-end: yes\n" in said) is shown
