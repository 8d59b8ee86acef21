"""Keys of a terminal, and that the terminal gets its former mode back however the process ends or stops."""

from __future__ import annotations

import select
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.agent.support import PATIENCE
from tests.support.terminal import Terminal, on_terminal
from tunneld.cli.keyboard import Keyboard, is_foreground, keys_in

PRESSED = """
import sys, trio
from tunneld.cli.keyboard import Keyboard

async def stop():
    print("stops", flush=True)

def press(key):
    print("pressed", key, flush=True)
    if key == "x":
        raise RuntimeError("crash")

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Keyboard(press, on_stop=stop, on_change=lambda: print("draws", flush=True)).run)
        with trio.open_signal_receiver(15, 2) as signals:
            print("runs", flush=True)
            async for _ in signals:
                nursery.cancel_scope.cancel()

trio.run(main)
"""


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"ab\r", ["a", "b", "enter"]),
        (b"\x1b[A", ["up"]),
        (b"\x1b", ["escape"]),
        (b"\x7f", ["backspace"]),
        ("ü".encode(), ["ü"]),
        (b"\x1b[15~", []),
        (b"\xff", []),
    ],
)
def test_keys_have_names(data: bytes, keys: list[str]) -> None:
    assert keys_in(data) == keys


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, "x", "\x03"], ids=str)
async def test_the_terminal_gets_its_mode_back(how: signal.Signals | str, terminal: Terminal) -> None:
    async with on_terminal(terminal, sys.executable, "-c", PRESSED) as process:
        await terminal.wait_for("runs")
        terminal.type("q")
        await terminal.wait_for("pressed q")
        assert not terminal.echoes()
        if isinstance(how, str):
            terminal.type(how)
        else:
            process.send_signal(how)
        await process.wait()
        assert terminal.echoes()


async def test_ctrl_z_gives_the_terminal_back_until_the_process_continues(terminal: Terminal, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    file = tmp_path / "pressed.py"
    file.write_text(PRESSED)
    async with on_terminal(terminal, bash, "--norc", "--noprofile", "--noediting", "-i"):
        terminal.type(f"{sys.executable} {file}\n")
        await terminal.wait_for("runs")
        terminal.type("q")
        await terminal.wait_for("pressed q")
        terminal.type("\x1a")
        for text in ("stops", "Stopped"):
            await terminal.wait_for(text)
        terminal.type("stty -a; echo mode $((6 * 7))\n")
        await terminal.wait_for(" echo ")
        await terminal.wait_for("mode 42")
        terminal.type("fg\n")
        await terminal.wait_for("draws")
        terminal.type("q")
        await terminal.wait_for("pressed q")
        assert not terminal.echoes()
        terminal.type("\x03")
        await terminal.wait_for("bash-")
        assert terminal.echoes()
        terminal.type("echo it $((6 * 7))\n")
        await terminal.wait_for("it 42")


def test_a_descriptor_that_is_no_terminal_is_in_the_foreground() -> None:
    assert is_foreground(-1)


async def test_the_mode_is_left_alone_while_another_process_has_the_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    front, keys = False, list[str]()
    monkeypatch.setattr("tunneld.cli.keyboard.is_foreground", lambda _descriptor: front)

    async def nothing() -> None:
        """Stop."""

    keyboard = Keyboard(keys.append, on_stop=nothing, on_change=lambda: None, descriptor=terminal.device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keyboard.run)
        await trio.sleep(10)
        assert terminal.echoes()
        front = True
        await trio.sleep(2)
        assert not terminal.echoes()
        terminal.type("q")
        assert select.select([terminal.device], [], [], PATIENCE)[0]
        await trio.sleep(2)
        assert keys == ["q"]
        nursery.cancel_scope.cancel()
    assert terminal.echoes()
