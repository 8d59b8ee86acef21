"""How `tunnel expose` talks, and that nobody who does not listen can stop it."""

from __future__ import annotations

import json
import os

import pytest
import trio

from tests.agent.support import PATIENCE
from tunneld.agent.events import Figures
from tunneld.cli import writer
from tunneld.cli.common import OutputGoneError
from tunneld.cli.tellers import JsonLines, Lines, Live, Quiet, live_line, public_address
from tunneld.cli.writer import Writer

ADDRESS = "tcp://192.0.2.1:20000"
OPENED = {"address": ADDRESS, "uri": "tcp://192.0.2.1:20001", "id": "t1"}
FAILED = {"visitor": "203.0.113.5:4242", "reason": "could not connect to 127.0.0.1:8000: connection refused"}


class Memory(Writer):
    """A writer that writes nowhere."""

    def __init__(self) -> None:
        super().__init__(-1, vital=False)

    @property
    def text(self) -> str:
        return "".join(self._lines)


def test_standard_output_has_the_address_alone() -> None:
    out, err = Memory(), Memory()
    lines = Lines(out, err, "http")
    lines.tell("opened", **OPENED)
    lines.tell("visitor", visitor="203.0.113.5:4242")
    lines.tell("left", visitor="203.0.113.5:4242", up=1, down=2, reason="finished")
    lines.tell("failed", **FAILED, repeated=0)
    lines.tell("failed", **FAILED, repeated=12)
    lines.tell("reconnecting", reason="control connection to relay lost", delay=2.0)
    lines.tell("closed", reason="told to stop", served=1, failed=13, up=1, down=2)
    assert out.text == "http://192.0.2.1:20000/\n"
    assert err.text.splitlines() == [
        "visitor 203.0.113.5:4242",
        "left 203.0.113.5:4242 up=1 down=2: finished",
        "visitor 203.0.113.5:4242: could not connect to 127.0.0.1:8000: connection refused",
        "visitor 203.0.113.5:4242: could not connect to 127.0.0.1:8000: connection refused (and 12 more)",
        "reconnecting in 2 s: control connection to relay lost",
        "closed: told to stop, served=1 failed=13 up=1 down=2",
    ]


def test_json_lines_parse_and_carry_the_time() -> None:
    out = Memory()
    JsonLines(out, "https").tell("opened", **OPENED)
    record = json.loads(out.text)
    assert record.pop("time").endswith("+00:00")
    assert record == {"event": "opened", **OPENED, "address": "https://192.0.2.1:20000/"}


def test_quiet_tells_failures_and_not_the_end() -> None:
    out, err = Memory(), Memory()
    quiet = Quiet(out, err, "tcp")
    quiet.tell("opened", **OPENED)
    quiet.tell("failed", **FAILED, repeated=0)
    quiet.tell("closed", reason="told to stop", served=0, failed=1, up=0, down=0)
    assert (out.text, err.text.count("\n")) == (ADDRESS + "\n", 1)


async def test_the_live_line_is_redrawn_in_place_and_only_when_it_changed(autojump_clock: trio.abc.Clock) -> None:
    err = Memory()
    figures = Figures()
    live = Live(Memory(), err, "tcp")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.run, lambda: figures)
        await trio.sleep(3.2)
        figures = Figures(now=1, served=1, parked=8)
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
    assert err.text.count("0 visitors now, 0 served") == 1
    assert err.text.count("\r\x1b[K1 visitor now, 1 served") == 1
    assert err.text.endswith("\r\x1b[K")


def test_the_live_line() -> None:
    before, now = Figures(up=0, down=0), Figures(3, 40, 1, 8, up=2048, down=20 << 20)
    assert live_line(now, before, 0.5) == (
        "3 visitors now, 40 served, 1 failed   up 2.0 KiB (4.0 KiB/s)   down 20 MiB (40 MiB/s)   8 parked"
    )


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


async def test_a_reader_that_stalls_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FAREWELL", 0.01)
    receive, send = os.pipe()
    with trio.fail_after(PATIENCE):
        async with Writer(send, vital=True).open() as written:
            for _ in range(3 * writer.HELD):
                written.put("x" * 99 + "\n")
            await trio.lowlevel.checkpoint()
            assert len(written._lines) <= writer.HELD
    os.close(receive)  # the thread that still writes ends by it
    os.close(send)


async def test_a_reader_that_leaves_ends_what_is_vital_and_nothing_else() -> None:
    receive, send = os.pipe()
    os.close(receive)
    with trio.fail_after(PATIENCE):
        async with Writer(send, vital=False).open() as written:
            written.put("line\n")
        with pytest.RaisesGroup(OutputGoneError):
            async with Writer(send, vital=True).open() as written:
                written.put("line\n")
                await trio.sleep_forever()
    os.close(send)
