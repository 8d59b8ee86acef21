"""A view that fills the terminal, which gets its former screen back."""

from __future__ import annotations

import os
import shutil

import pytest
import trio
import trio.testing

from tunneld.cli.screen import ENTER, LEAVE, Screen
from tunneld.cli.styled import Line
from tunneld.cli.writer import Writer


class Memory(Writer):
    """A writer that keeps its lines in memory."""

    def __init__(self) -> None:
        super().__init__(-1, vital=False)
        self.taking = trio.Event()

    async def flush(self) -> None:
        await self.taking.wait()

    def taken(self) -> str:
        """What was written since the last call."""
        text = "".join(self._lines)
        self._lines.clear()
        return text


class Lines:
    """A view of fixed lines."""

    texts = ("one", "two")

    def lines(self, _now: float, _size: os.terminal_size) -> list[Line]:
        return [[(text, "")] for text in self.texts]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> tuple[Memory, Lines, Screen]:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda **_fallback: os.terminal_size((80, 3)))
    out, view = Memory(), Lines()
    return out, view, Screen(out, view, colours=False)


async def test_the_screen_is_entered_once_and_left_once(shown: tuple[Memory, Lines, Screen]) -> None:
    out, _, screen = shown
    screen.leave()
    assert out.taken() == ""
    screen.paint()
    assert out.taken() == ENTER + "\x1b[1;1Hone\x1b[K\x1b[2;1Htwo\x1b[K"
    screen.paint()
    assert out.taken() == ""
    screen.leave()
    screen.leave()
    assert out.taken() == LEAVE


async def test_only_lines_that_changed_are_written(shown: tuple[Memory, Lines, Screen]) -> None:
    out, view, screen = shown
    screen.paint()
    out.taken()
    view.texts = ("one", "three")
    screen.paint()
    assert out.taken() == "\x1b[2;1Hthree\x1b[K"
    view.texts = ("one",)  # type: ignore[assignment]
    screen.paint()
    assert out.taken() == "\x1b[2;1H\x1b[J"
    view.texts = ("one", "2", "3", "4")  # type: ignore[assignment]
    screen.paint()
    assert out.taken() == "\x1b[2;1H2\x1b[K\x1b[3;1H3\x1b[K"  # as many as there is room for


async def test_after_a_stop_everything_is_drawn_again(shown: tuple[Memory, Lines, Screen]) -> None:
    out, _, screen = shown
    screen.paint()
    out.taken()
    out.taking.set()
    await screen.stop()
    assert out.taken() == LEAVE
    screen.redraw()
    screen.paint()
    assert out.taken().startswith(ENTER)
    screen.redraw()
    screen.paint()
    assert "one" in out.taken()


async def test_a_terminal_that_takes_nothing_gets_one_drawing_once_it_does(
    shown: tuple[Memory, Lines, Screen],
) -> None:
    out, view, screen = shown
    async with trio.open_nursery() as nursery:
        nursery.start_soon(screen.run)
        for text in ("a", "b", "c"):
            view.texts = (text, "two")
            screen.draw()
            await trio.testing.wait_all_tasks_blocked()
        assert out.taken() == ""
        out.taking.set()
        await trio.testing.wait_all_tasks_blocked()
        assert out.taken() == ENTER + "\x1b[1;1Hc\x1b[K\x1b[2;1Htwo\x1b[K"
        nursery.cancel_scope.cancel()
