"""A view at the bottom of a terminal: it is updated in place, and permanent lines stay above it."""

from __future__ import annotations

import os
import re
import shutil

import pytest
import trio
import trio.testing

from tunneld.cli.board import Board
from tunneld.cli.styled import Line
from tunneld.cli.writer import Writer


class Memory(Writer):
    """A writer that keeps its lines in memory."""

    def __init__(self) -> None:
        super().__init__(-1, vital=False)

    @property
    def queued(self) -> int:
        return 0

    @property
    def text(self) -> str:
        return "".join(self._lines)


class Lines:
    """A view of fixed lines."""

    def __init__(self, *lines: str) -> None:
        self.texts = list(lines)

    def lines(self, _now: float, _size: os.terminal_size) -> list[Line]:
        return [[(text, "")] for text in self.texts]


def screen(text: str, columns: int = 80) -> list[str]:
    """The lines that a terminal shows after receiving `text`."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[AKJ]|\n|\r|[^\x1b\n\r]+", text):
        match part[-1], part[0]:
            case "\n", _:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            case "\r", _:
                column = 0
            case "A", "\x1b":
                row -= int(part[2:-1] or 1)
                assert row >= 0, "above the first line"
            case "K", "\x1b":
                lines[row] = lines[row][:column]
            case "J", "\x1b":
                lines[row:] = [lines[row][:column]]
            case _:
                for char in part:
                    if column == columns:
                        row, column = row + 1, 0
                        lines += [""] * (row + 1 - len(lines))
                    lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
                    column += 1
    return lines


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of the terminal, to be changed."""
    found = [80]
    monkeypatch.setattr(shutil, "get_terminal_size", lambda **_fallback: os.terminal_size((found[0], 25)))
    return found


async def test_only_lines_that_changed_are_written_again(autojump_clock: trio.abc.Clock, columns: list[int]) -> None:
    err = Memory()
    board, view = Board(err), Lines("address", "0 visitors", "hints")
    board.view = view
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        await trio.sleep(3.2)
        view.texts[1] = "1 visitor"
        await trio.sleep(3)
        assert screen(err.text) == ["address", "1 visitor", "hints"]
        nursery.cancel_scope.cancel()
    assert [err.text.count(word) for word in ("address", "0 visitors", "1 visitor", "hints")] == [1, 1, 1, 1]
    assert screen(err.text) == [""]


async def test_notices_stay_above_the_view(autojump_clock: trio.abc.Clock, columns: list[int]) -> None:
    err = Memory()
    board, board_view = Board(err), Lines("one", "two")
    board.view = board_view
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        await trio.sleep(1)
        board.notice("lost", time="12:00:00")
        board.notice("refused")
        await trio.sleep(1)
        board_view.texts = ["one"]
        await trio.sleep(1)
        assert screen(err.text) == ["12:00:00 lost", "refused", "one"]
        nursery.cancel_scope.cancel()
    assert screen(err.text) == ["12:00:00 lost", "refused", ""]


async def test_long_lines_wrap_and_are_erased_whole_in_a_terminal_that_became_narrow(
    autojump_clock: trio.abc.Clock, columns: list[int]
) -> None:
    err, columns[0] = Memory(), 10
    board = Board(err)
    board.view = Lines("0123456789abc", "two")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        await trio.sleep(1)
        assert screen(err.text, 10) == ["0123456789", "abc", "two"]
        nursery.cancel_scope.cancel()
    assert screen(err.text, 10) == [""]
    board = Board(err)
    columns[0] = 80
    board._draw([[("0" * 40, "")], [("two", "")]])
    columns[0] = 10
    board._draw([])
    assert err.text.endswith("\x1b[4A\r\x1b[J")  # the terminal has wrapped the first line into four


async def test_a_view_is_drawn_at_once_when_asked_for(autojump_clock: trio.abc.Clock, columns: list[int]) -> None:
    err, view = Memory(), Lines("one")
    board = Board(err)
    board.view = view
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        await trio.testing.wait_all_tasks_blocked()
        view.texts = ["two"]
        board.redraw()
        await trio.testing.wait_all_tasks_blocked()
        assert screen(err.text) == ["two"]
        nursery.cancel_scope.cancel()


async def test_without_a_view_nothing_is_drawn(autojump_clock: trio.abc.Clock) -> None:
    err = Memory()
    with trio.move_on_after(5):
        await Board(err).run()
    assert err.text == ""


async def test_nothing_is_drawn_while_another_process_has_the_terminal(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunneld.cli.board.is_foreground", lambda _descriptor: False)
    err = Memory()
    board = Board(err)
    board.view = Lines("one")
    with trio.move_on_after(5):
        await board.run()
    assert err.text == ""
