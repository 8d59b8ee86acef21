"""The view of one exposure."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import trio

from tunneld.agent.events import Activity, LatestVisitor, Stats
from tunneld.cli.panel import Panel, format_milliseconds
from tunneld.cli.qr import qr_code
from tunneld.cli.styled import render, width

STATS = Stats(now=1, served=40, failed=1, up=1 << 20, down=20 << 20)
OPENED = {"address": "tcp://192.0.2.1:20000", "uri": "tcp://192.0.2.1:20001", "id": "t1"}
RELAY = "relay.example.org:7010"


class Shown:
    """A panel, and what it shows."""

    def __init__(self, **options: Any) -> None:
        self.activity = Activity(STATS, latency=0.012)
        self.panel = Panel("127.0.0.1:8000", RELAY, lambda: self.activity, **options)
        self.panel.address = "http://192.0.2.1:20000/"

    def text(self, columns: int = 100, lines: int = 30, now: float | None = None) -> list[str]:
        now = trio.current_time() if now is None else now
        made = self.panel.lines(now, os.terminal_size((columns, lines)))
        assert all(width(line) <= columns for line in made[1:])
        assert len(made) < max(2, lines)
        return [render(line, colours=False).rstrip() for line in made]


async def test_the_panel_shows_everything_about_an_exposure() -> None:
    shown = Shown(keys=True)
    shown.panel.update("opened", OPENED)
    text = shown.text()
    assert text[:3] == ["http://192.0.2.1:20000/", "", "local server   127.0.0.1:8000"]
    assert re.fullmatch(rf"relay          {RELAY}   connected since \d\d:\d\d   round trip 12 ms", text[3])
    assert text[4:] == [
        "visitors       1 now   40 served   1 failed",
        "traffic        up 1.0 MiB (0 B/s)   down 20 MiB (0 B/s)",
        "",
        "q QR code   Ctrl-C stop",
    ]


async def test_the_latest_visitors_have_rates_and_reasons() -> None:
    shown = Shown()
    shown.panel.update("admitted", {"visitor": "192.0.2.9:1", "peer": "bob", "id": "AAEC"})
    now = trio.current_time()
    connected = LatestVisitor("203.0.113.5:4242", now - 12, 100, 0)
    left = LatestVisitor("192.0.2.9:1", now - 30, 300, 12 << 10, now - 28, "finished")
    shown.activity = replace(shown.activity, latest=(connected, left))
    shown.text()
    shown.activity = replace(shown.activity, latest=(replace(connected, down=2 << 10), left))
    assert shown.text(now=now + 1)[-3:] == [
        "latest visitors       up      down",
        "203.0.113.5:4242   100 B   2.0 KiB   2.0 KiB/s for 13s",
        "bob                300 B    12 KiB   finished after 2s",
    ]
    assert shown.text(columns=52)[-1] == "bob                300 B    12 KiB   finished after…"
    assert shown.text(columns=38)[-1] == "bob                300 B    12 KiB"


async def test_without_a_connection_the_reason_is_shown_in_full() -> None:
    shown = Shown()
    shown.panel.update("reconnecting", {"reason": "control connection to the relay lost", "delay": 3.7})
    assert shown.text(columns=40)[3:7] == [
        f"relay          {RELAY}",
        "               reconnecting in 4 s:",
        "               control connection to the",
        "               relay lost",
    ]
    shown.panel.update("unhealthy", {"reason": "no answer in 5 s"})
    assert "               unhealthy: no answer in 5 s" in shown.text()


async def test_while_stopping_the_panel_says_what_another_ctrl_c_does() -> None:
    shown = Shown(keys=True)
    shown.panel.update("draining", {"id": "t1", "visitors": 1, "delay": 30.0})
    assert "stopping, disconnecting in 30 s" in shown.text()[3]
    assert shown.text()[-1] == "q QR code   Ctrl-C disconnect now"


@pytest.mark.parametrize("lines", range(1, 40))
async def test_a_low_terminal_does_not_scroll(lines: int) -> None:
    shown = Shown(keys=True)
    now = trio.current_time()
    visitors = [LatestVisitor(f"192.0.2.1:{port}", now, 0, 0) for port in range(20)]
    shown.activity = replace(shown.activity, latest=visitors)
    assert shown.text(lines=lines)[0] == "http://192.0.2.1:20000/"
    shown.panel.on_key("q")
    shown.text(lines=lines)


async def test_q_shows_the_code_and_hides_it() -> None:
    shown = Shown(keys=True)
    before = shown.text()
    shown.panel.on_key("q")
    code = [render(line, colours=False).rstrip() for line in qr_code("http://192.0.2.1:20000/", colours=False)]
    assert shown.text()[7:-2] == code
    assert "q hide the QR code" in shown.text()[-1]
    assert shown.text(lines=16)[7] == "the terminal is too small for the QR code: it takes 29 columns and 25 lines"
    assert len(shown.text(lines=25)) == 24
    shown.panel.on_key("escape")
    assert shown.text() == before


async def test_without_segno_the_panel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    qr_code.cache_clear()
    assert Shown(show_code=True).text()[7].startswith("no QR code: the Python module segno is not installed")


def test_a_code_is_dark_on_light_where_there_are_colours() -> None:
    dark, light = (
        ["".join(text for text, _ in line) for line in qr_code("http://x/", colours=colours)]
        for colours in (True, False)
    )
    swap = str.maketrans(" ▀▄█", "█▄▀ ")
    assert [line.translate(swap) for line in dark] == light
    assert qr_code("http://x/", colours=True)[0][0][1] == "30;107"


@pytest.mark.parametrize(("seconds", "text"), [(0.00031, "0.3 ms"), (0.0121, "12 ms"), (1.5, "1500 ms")])
def test_milliseconds_have_no_false_digits(seconds: float, text: str) -> None:
    assert format_milliseconds(seconds) == text
