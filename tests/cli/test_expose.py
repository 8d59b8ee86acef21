"""`tunnel expose` on a terminal, and how it leaves that terminal."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest
import trio

from tests.agent.support import PATIENCE, echo, local_server, relay_here
from tests.agent.test_expose import ask
from tests.support.programs import program, tunnel_command
from tests.support.terminal import Terminal, on_terminal


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


async def test_a_terminal_shows_the_exposure_and_is_left_with_one_message(terminal: Terminal) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            command = tunnel_command("expose", str(target.port), "--relay", relay.where)
            async with on_terminal(terminal, *command) as process:
                await terminal.wait_for("local server")
                await terminal.wait_for("connected since")
                assert await ask(relay.tunnel.client_uri, b"hello") == b"hello"
                await terminal.wait_for("1 served")
                await terminal.wait_for("finished after")
                terminal.type("q")
                await terminal.wait_for("hide the QR code")
                process.send_signal(signal.SIGINT)
                await terminal.wait_for("closed: told to stop; 1 visitor served")
                assert await process.wait() == 0
                assert terminal.echoes()


@pytest.mark.parametrize("option", ["--json", "--quiet"])
async def test_a_code_is_no_part_of_these_outputs(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    done = await trio.run_process(
        tunnel_command("expose", "8000", "--qr", option), check=False, capture_stderr=True, capture_stdout=True
    )
    assert (done.returncode, done.stderr.decode()) == (64, f"tunnel: --qr cannot be combined with {option}\n")


async def test_without_a_terminal_everything_is_a_line() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            command = tunnel_command("expose", str(target.port), "--relay", relay.where)
            async with program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                assert process.stdout is not None
                assert process.stderr is not None
                assert (await process.stdout.receive_some()).decode() == f"{relay.tunnel.client_uri}\n"
                process.send_signal(signal.SIGTERM)
                printed = b"".join([chunk async for chunk in process.stderr]).decode()
                assert printed == "closed: told to stop; 0 visitors served, 0 B up, 0 B down\n"
