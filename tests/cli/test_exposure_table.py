"""The view of `tunnel up`: one aligned table."""

from __future__ import annotations

import os
import re

import trio

from tunneld.agent.events import Activity, Stats
from tunneld.cli.exposure_table import ExposureTable, Row, fitting, traffic
from tunneld.cli.styled import Line, Span, render

OPENED = {"address": "tcp://192.0.2.1:20000", "uri": "tcp://192.0.2.1:20001", "id": "t1"}


def texts(lines: list[Line]) -> list[str]:
    return [render(line, colours=False).rstrip() for line in lines]


def row(*cells: str, text: str = "") -> tuple[list[Span], Span]:
    return [(cell, "") for cell in cells], (text, "")


async def test_lines_are_sorted_by_name() -> None:
    table = ExposureTable()
    for name in ("web", "shell", "blog"):
        table.add(name, Activity)
    lines = texts(table.lines(trio.current_time(), os.terminal_size((80, 25))))
    assert lines == ["blog    connecting", "shell   connecting", "web     connecting"]


async def test_a_line_describes_the_state_of_its_exposure() -> None:
    line, now = Row("a", Activity), trio.current_time()
    assert line.cells(now) == ([("a", "")], ("connecting", ""))
    line.update("opened", OPENED)
    (_, (state, _), *counts), text = line.cells(now)
    assert re.fullmatch(r"connected since \d\d:\d\d", state)
    assert (counts[0][0], text[0]) == ("0 visitors now", "")
    line.update("unhealthy", {"reason": "no answer in 5 s"})
    assert line.cells(now)[0][1][0] == f"{state}, unhealthy"
    line.update("healthy", {})
    line.update("reconnecting", {"reason": "lost", "delay": 3.7})
    assert line.cells(now)[1][0] == "reconnecting in 4 s: lost"
    assert line.cells(now + 4)[1][0] == "reconnecting now: lost"
    line.update("resumed", OPENED)
    assert line.cells(now)[0][1][0].startswith("connected since ")


def test_what_does_not_fit_is_left_out_whole() -> None:
    rows = [row("blog", "connected", "3 visitors now"), row("f", "stopping", "40 visitors now")]
    assert texts(fitting(rows, (80, 25))) == ["blog   connected   3 visitors now", "f      stopping    40 visitors now"]
    assert texts(fitting(rows, (33, 25))) == ["blog   connected", "f      stopping"]
    rows.append(row("x", text="reconnecting in 4 s: lost"))
    assert texts(fitting(rows, (25, 25)))[2] == "x      reconnecting in 4…"


def test_lines_never_wrap_and_never_scroll() -> None:
    def plain(*names: str) -> list[tuple[list[Span], Span]]:
        return [row(name) for name in names]

    assert texts(fitting(plain(*"abcd"), (80, 5))) == list("abcd")
    assert texts(fitting(plain(*"abcde"), (80, 5))) == ["a", "b", "c", "and 2 more"]
    assert texts(fitting(plain(*"ab"), (80, 1))) == ["and 2 more"]
    assert fitting([], (80, 25)) == []


def test_the_traffic() -> None:
    assert traffic(Stats(3, 40, 1, 8, up=2048, down=20 << 20), (4096, 40 << 20)) == [
        "3 visitors now",
        "40 served, 1 failed",
        "up 2.0 KiB (4.0 KiB/s)",
        "down 20 MiB (40 MiB/s)",
        "8 connections ready",
    ]
