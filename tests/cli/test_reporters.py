"""The output formats of `tunnel expose`, and that a reader that stalls cannot stop the agent."""

from __future__ import annotations

import json
import os
import re

import pytest
import trio

from tests.agent.support import PATIENCE
from tunneld.agent.events import Stats
from tunneld.cli import board
from tunneld.cli.board import Board, Row, Writer, fitting, traffic
from tunneld.cli.common import OutputGoneError
from tunneld.cli.reporters import JsonReporter, LineReporter, LiveReporter, QuietReporter, public_address

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


class Terminal(Memory):
    """A writer that claims to be a terminal."""

    is_terminal = True


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


async def test_status_lines_are_sorted_by_name() -> None:
    err = Memory()
    board = Board(err)
    for name in ("web", "shell", "blog"):
        board.add(name, Stats)
    with trio.move_on_after(0.01):
        await board.run()
    assert err.text.split("\r")[0].splitlines() == ["blog    connecting", "shell   connecting", "web     connecting"]


async def test_the_address_is_printed_above_the_status_line_if_both_go_to_one_terminal() -> None:
    out, err = Terminal(), Terminal()
    board = Board(err)
    live = LiveReporter(out, board, "http")
    with trio.move_on_after(0.01):
        await board.run()
    live.report("opened", **OPENED)
    assert (out.text, screen(err.text)) == ("", ["http://192.0.2.1:20000/", ""])


def test_addresses_on_a_terminal_are_aligned() -> None:
    out, err = Terminal(), Terminal()
    board = Board(err)
    live = [LiveReporter(out, board, "http", name) for name in ("blog", "a-longer-name")]
    for one in live:
        one.report("opened", **OPENED)
    assert err.text.splitlines() == [
        "blog            http://192.0.2.1:20000/",
        "a-longer-name   http://192.0.2.1:20000/",
    ]


async def test_the_status_line_is_redrawn_in_place_and_only_when_it_changed(autojump_clock: trio.abc.Clock) -> None:
    err = Memory()
    board, figures = Board(err), Stats()
    live = LiveReporter(Memory(), board, "tcp", stats=lambda: figures)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        live.report("opened", **OPENED)
        await trio.sleep(3.2)
        figures = Stats(now=1, served=1, parked=8)
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
    assert err.text.count("0 visitors now   0 served") == 1
    assert err.text.count("1 visitor now   1 served") == 1
    assert err.text.startswith("connected since ")
    assert err.text.endswith("\r\x1b[K")


async def test_two_exposures_have_a_line_each_and_notices_stay_above_them(autojump_clock: trio.abc.Clock) -> None:
    err = Memory()
    board = Board(err)
    tellers = [LiveReporter(Memory(), board, "tcp", name, clock=str) for name in ("blog", "shell")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        await trio.sleep(1)
        tellers[0].report("reconnecting", reason="lost", delay=4.0)
        await trio.sleep(1)
        tellers[1].report("ended", reason="refused")
        await trio.sleep(1)
        assert screen(err.text) == [
            "blog: reconnecting in 4 s: lost",
            "shell: failed permanently: refused",
            "blog   reconnecting in 2 s: lost",
        ]
        nursery.cancel_scope.cancel()
    assert screen(err.text)[2:] == [""]


async def test_a_replaced_exposure_keeps_its_line_until_its_last_visitor_has_left(
    autojump_clock: trio.abc.Clock,
) -> None:
    err = Memory()
    board = Board(err)
    former = LiveReporter(Memory(), board, "tcp", "blog", stats=lambda: Stats(now=1, served=1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        former.report("draining", id="t1", visitors=1, delay=30.0)
        successor = LiveReporter(Memory(), board, "tcp", "blog")
        await trio.sleep(1.2)
        assert [line[:14] for line in screen(err.text)[1:]] == ["blog   stoppin", "blog   connect"]
        former.report("closed", id="t1", reason="wanted in another way", served=1, failed=0, up=0, down=0)
        successor.report("reconnecting", reason="lost", delay=4.0)
        await trio.sleep(1.2)
        assert list(filter(None, screen(err.text)))[3:] == ["blog   reconnecting in 3 s: lost"]
        nursery.cancel_scope.cancel()


async def test_without_exposures_nothing_is_drawn(autojump_clock: trio.abc.Clock) -> None:
    err = Memory()
    with trio.move_on_after(5):
        await Board(err).run()
    assert err.text == ""


async def test_a_status_line_describes_the_state_of_its_exposure(autojump_clock: trio.abc.Clock) -> None:
    row, now = Row("", Stats), trio.current_time()
    assert row.cells(now) == ([], "connecting")
    row.update("opened", OPENED)
    (state, *counts), text = row.cells(now)
    assert re.fullmatch(r"connected since \d\d:\d\d", state)
    assert (counts[0], text) == ("0 visitors now", "")
    row.update("unhealthy", {"reason": "no answer in 5 s"})
    assert row.cells(now)[0][0] == f"{state}, unhealthy"
    row.update("healthy", {})
    row.update("reconnecting", {"reason": "lost", "delay": 3.7})
    assert row.cells(now) == ([], "reconnecting in 4 s: lost")
    assert row.cells(now + 4) == ([], "reconnecting now: lost")
    row.update("resumed", OPENED)
    assert row.cells(now)[0][0].startswith("connected since ")


def test_status_lines_are_a_table_and_what_does_not_fit_is_left_out_whole() -> None:
    rows = [(["blog", "connected", "3 visitors now"], ""), (["f", "stopping", "40 visitors now"], "")]
    assert fitting(rows, (80, 25)) == ["blog   connected   3 visitors now", "f      stopping    40 visitors now"]
    assert fitting(rows, (34, 25)) == ["blog   connected", "f      stopping"]
    assert fitting([*rows, (["x"], "reconnecting in 4 s: lost")], (20, 25))[2] == "x      reconnectin…"


def test_status_lines_never_wrap_and_never_scroll() -> None:
    def plain(*texts: str) -> list[tuple[list[str], str]]:
        return [([], text) for text in texts]

    assert fitting(plain("abcdef", "b", "c"), (4, 25)) == ["ab…", "b", "c"]
    assert fitting(plain(*"abcd"), (80, 5)) == list("abcd")
    assert fitting(plain(*"abcde"), (80, 5)) == ["a", "b", "c", "and 2 more"]
    assert fitting(plain(*"ab"), (80, 1)) == ["and 2 more"]
    assert fitting([], (80, 25)) == []


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after receiving `text`."""
    lines, row = [""], 0
    for part in re.split(r"(\n|\r\x1b\[K|\x1b\[A)", text):
        match part:
            case "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            case "\r\x1b[K":
                lines[row] = ""
            case "\x1b[A":
                row -= 1
            case _:
                lines[row] += part
    return lines


def test_the_traffic() -> None:
    before, now = Stats(up=0, down=0), Stats(3, 40, 1, 8, up=2048, down=20 << 20)
    assert traffic(now, before, 0.5) == [
        "3 visitors now",
        "40 served, 1 failed",
        "up 2.0 KiB (4.0 KiB/s)",
        "down 20 MiB (40 MiB/s)",
        "8 connections ready",
    ]


def test_an_ipv6_address_keeps_its_brackets() -> None:
    assert public_address("tcp://[2001:db8::1]:80", "http") == "http://[2001:db8::1]:80/"


async def test_a_writer_writes_everything_in_order_before_its_block_ends() -> None:
    receive, send = os.pipe()
    with trio.fail_after(PATIENCE):
        async with Writer(send, vital=True).open() as written:
            for number in range(1000):
                written.put(f"{number}\n")
    os.close(send)
    with os.fdopen(receive) as lines:
        assert [int(line) for line in lines] == list(range(1000))


async def test_a_writer_writes_what_an_error_leaves_in_its_queue() -> None:
    receive, send = os.pipe()
    with trio.fail_after(PATIENCE), pytest.RaisesGroup(ValueError):
        async with Writer(send, vital=True).open() as written:
            written.put("why it ended\n")
            raise ValueError
    os.close(send)
    with os.fdopen(receive) as lines:
        assert lines.read() == "why it ended\n"


async def test_a_stalled_reader_does_not_block_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "FINAL_WRITE_TIMEOUT", 0.01)
    receive, send = os.pipe()
    with trio.fail_after(PATIENCE):
        async with Writer(send, vital=True).open() as written:
            for _ in range(3 * board.MAX_QUEUED_LINES):
                written.put("x" * 99 + "\n")
            await trio.lowlevel.checkpoint()
            assert written.queued <= board.MAX_QUEUED_LINES
    os.close(receive)  # the thread that still writes ends by it
    os.close(send)


async def test_a_closed_reader_ends_only_a_vital_writer() -> None:
    receive, send = os.pipe()
    os.close(receive)
    with trio.fail_after(PATIENCE):
        failures: list[str] = []
        async with Writer(send, vital=False, on_failure=failures.append).open() as written:
            written.put("line\n")
            while not failures:
                await trio.lowlevel.checkpoint()
            written.put("another line\n")
        assert failures == ["could not write to standard output: broken pipe"]
        with pytest.RaisesGroup(OutputGoneError):
            async with Writer(send, vital=True).open() as written:
                written.put("line\n")
                await trio.sleep_forever()
    os.close(send)


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
