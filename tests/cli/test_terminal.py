"""No relay can write control characters to the user's terminal, whichever command prints its text."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from typing import Any

import pytest
import trio

from tests.support.peers import PATIENCE
from tests.support.programs import program, tunnel_command
from tests.support.scripted_relays import GREETING, fake_relay
from tunneld import log
from tunneld.cli.agent_log import print_line
from tunneld.cli.board import Board
from tunneld.cli.commands import VERBS
from tunneld.cli.common import complain, printable_lines, run, say
from tunneld.cli.tunnel import parser
from tunneld.cli.writer import Writer
from tunneld.errors import TunneldError

EVIL = "\x1b]0;owned\x07 \x9b2J \x7f\r\b \u202egnp.exe\u2066 \u2028 \ue000 end"
"""C0 and C1 controls, a carriage return, direction marks, a line separator, a private character."""
FIELDS = ("id", "name", "client", "owner", "reason", "event", "visitor", "key", "value", "version", "phase", "time")

ARGUMENTS = {
    "address": ["tcp://relay:1"],
    "show": ["t1"],
    "close": ["t1"],
    "drain": ["t1"],
    "trim": ["t1", "1"],
    "release": ["80"],
    "pardon": ["192.0.2.1"],
    "kick": ["t1", "192.0.2.1"],
    "ban": ["192.0.2.1"],
    "unban": ["192.0.2.1"],
    "share": ["blog", "--for", "2h"],
    "set": ["t1", "bandwidth=1M"],
}
QUOTED = (
    '"' + EVIL.replace("\r", "\\r").replace("\x1b", "\\u001b").replace("\x07", "\\u0007").replace("\b", "\\b") + '\\n"'
)


def items() -> bytes:
    """Two items whose values hold everything, also a line end."""
    line = "* " + " ".join(f"{key}={QUOTED}" for key in FIELDS) + "\n"
    return line.encode() * 2


REPLIES = {
    "an error": f"ERR usage {EVIL}\n".encode(),
    "a text": f"OK {EVIL}\n".encode(),
    "items": items() + f"OK {EVIL}\n".encode(),
    "a malformed line": f"{EVIL}\n".encode(),
    "a malformed item": f"* x={EVIL}\n".encode(),
}


def check(text: str) -> None:
    """Fail unless all of it prints; lines and tabs are ours."""
    unprintable = [char for char in text if not char.isprintable() and char not in "\n\t"]
    assert unprintable == []


async def output_of(arguments: list[str], reply: bytes, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints if the relay gives this reply to every request, and closes after two."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(GREETING)
        for _ in range(2):
            if not await stream.receive_some():
                return
            await stream.send_all(reply)

    async with fake_relay(serve) as endpoint:
        options = parser().parse_args([*arguments, "--relay", str(endpoint)])
        failure: list[BaseException] = []
        try:
            await options.command(options)
        except (TunneldError, ExceptionGroup) as error:
            failure.append(error)

        def fail() -> int:
            for error in failure:
                raise error
            return 0

        run("tunnel", fail)
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("verb", [verb.name for verb in VERBS if verb.name != "restart"])
async def test_a_command_prints_no_control_characters_of_a_relay(
    verb: str, reply: str, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = await output_of([verb, *ARGUMENTS.get(verb, []), *form], REPLIES[reply], capsys)
    assert "internal error" not in printed
    check(printed)
    if form and reply == "items":
        for line in printed.splitlines():
            if line.startswith("{"):
                json.loads(line)


async def test_draining_reports_a_hostile_reason_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    closed = f'* event=closed id=t1 reason="{EVIL[1:5]}\\nroot# rm"\n'.encode()
    printed = await output_of(["drain", "--wait", "t1"], b"OK draining\n" + closed, capsys)
    check(printed)
    assert not any(line.startswith("root#") for line in printed.splitlines())


@pytest.mark.parametrize("flag", [[], ["--json"], ["--quiet"]], ids=str)
@pytest.mark.parametrize("reply", ["an error", "a malformed line", "a text"])
async def test_an_agent_prints_no_control_characters_of_a_relay(flag: list[str], reply: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(GREETING)
        if await stream.receive_some():
            await stream.send_all(REPLIES[reply])

    async with fake_relay(serve) as endpoint:
        command = tunnel_command("expose", "9", "--relay", str(endpoint), *flag)
        with trio.fail_after(PATIENCE):
            async with program(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
                assert process.stdout is not None
                printed = b""
                while b"owned" not in printed:  # it may try again for ever
                    chunk = await process.stdout.receive_some()
                    assert chunk, printed
                    printed += chunk
    check(printed.decode())


class Memory(Writer):
    """A writer that keeps its text in memory."""

    def __init__(self) -> None:
        super().__init__(-1, vital=False)

    @property
    def text(self) -> str:
        return "".join(self._lines)


def test_lines_of_the_agent_are_escaped_and_status_lines_too() -> None:
    err = Memory()
    err.put(f"{EVIL}\n")
    check(err.text)
    board = Board(err)
    board.notice(EVIL)
    check(err.text)
    board._draw([[(EVIL, "")]])
    assert err.text.count("\x1b") == 0  # nothing was drawn before that needs to be erased


def test_the_log_of_an_agent_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    log.send_to(print_line)
    try:
        log.Logger("agent").warning(f"event {EVIL}", reason=EVIL.replace(" ", ""))
        log.Logger("agent").error("failed", exc_info=ValueError(EVIL))
    finally:
        log.send_to(log.to_structlog)
    printed = capsys.readouterr().err
    assert "owned" in printed
    check(printed)


@pytest.mark.parametrize("write", [say, complain, partial(say, end="")])
def test_both_outputs_escape_and_keep_lines_and_tabs(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write(f"one\ttwo\n{EVIL}\n")
    printed = "".join(capsys.readouterr())
    assert printed.startswith("one\ttwo\n")
    check(printed)


def test_text_that_prints_is_unchanged() -> None:
    text = "größer — 日本語 🚇\n\n\tx\n"
    assert printable_lines(text) == text
    assert printable_lines("a\r\nb\x1b[0m\u202e") == "a\\r\nb\\x1b[0m\\u202e"
