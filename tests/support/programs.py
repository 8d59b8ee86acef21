"""The real daemon and other programs, as child processes that end with their block."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from tests.support.peers import PATIENCE
from tests.support.pki import Pki

CONFIG = """
[control]
port = {control}
[http]
port = 0
[webmux]
port = 0
[tunnels]
ports = "{ports}"
linger = 5.0
[daemon]
drain_timeout = {drain_timeout}
state = "state"
{daemon_lines}
"""

EGTP = """
[egtp]
enabled = true
port = 0
"""
"""Has a relay open the port for EGTP nodes."""

TLS = """
[control.tls]
certificate = "{folder}/relay.pem"
key = "{folder}/relay.key"
"""


class Daemon:
    """A running `tunneld`: its addresses and its log."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.control = ""
        self.http = ""
        self.log: list[dict[str, Any]] = []
        self._heard = trio.Condition()

    async def listen(self) -> None:
        """Collect the log until the process closes it."""
        assert self.process.stderr is not None
        pending = b""
        async for chunk in self.process.stderr:
            *lines, pending = (pending + chunk).split(b"\n")
            self.log += [json.loads(line) if line.startswith(b"{") else {"event": line.decode()} for line in lines]
            async with self._heard:
                self._heard.notify_all()

    async def wait_logged(self, event: str, times: int = 1) -> dict[str, Any]:
        """Wait until the log has an event this many times in total; returns the last one."""
        with trio.fail_after(PATIENCE):
            while True:
                found = [line for line in self.log if line["event"] == event]
                if len(found) >= times:
                    return found[-1]
                async with self._heard:
                    await self._heard.wait()

    @property
    def control_port(self) -> int:
        """The number of the control port."""
        return int(self.control.rpartition(":")[2])

    @property
    def descriptors(self) -> int:
        """The number of open descriptors."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    async def ask(self, *lines: str) -> str:
        """Send lines to the control port; returns everything received, including the greeting."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.control_port)
        async with stream:
            await stream.send_all(("\n".join([*lines, "quit"]) + "\n").encode())
            return b"".join([chunk async for chunk in stream]).decode()


@asynccontextmanager
async def daemon(
    folder: Path,
    drain_timeout: float = 20.0,
    pki: Pki | None = None,
    words: str = "",
    control: int = 0,
    ports: str = "0",
    daemon_lines: str = "",
    how: Sequence[str] = (sys.executable, "-m", "tunneld"),
) -> AsyncIterator[Daemon]:
    """Run a `tunneld` on free ports, with its state in `folder`; ready when the block begins, killed at the end.

    With `pki`, it uses TLS. `words` is added to the configuration, `daemon_lines` to its table `[daemon]`. `how` is the
    command.
    """
    config = folder / "tunnel.toml"
    tls = TLS.format(folder=pki.folder) if pki else ""
    config.write_text(
        CONFIG.format(drain_timeout=drain_timeout, control=control, ports=ports, daemon_lines=daemon_lines)
        + tls
        + words
    )
    command = [*how, "--config", str(config), "--log-format", "json"]
    async with program(command, stderr=subprocess.PIPE) as process, trio.open_nursery() as nursery:
        running = Daemon(process)
        nursery.start_soon(running.listen)
        running.control = (await running.wait_logged("control listens"))["uri"]
        running.http = (await running.wait_logged("http listens"))["uri"]
        await running.wait_logged("ready")
        yield running
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def program(command: list[str], **options: Any) -> AsyncIterator[trio.Process]:
    """Run a child process, and kill it when the block ends."""
    process = await trio.lowlevel.open_process(command, **options)
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    await pipe.aclose()


async def free_port() -> int:
    """Return a free port, for programs that cannot report their port."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        return int(listener.socket.getsockname()[1])


def lasting_port() -> int:
    """Return a free port that the kernel does not use for outgoing connections, so that it stays free for restarts."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@asynccontextmanager
async def listening(command: list[str], port: int, **options: Any) -> AsyncIterator[trio.Process]:
    """Run a program; it listens on `port` of loopback when the block begins."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    async with program(command, **(quiet | options)) as process:
        with trio.fail_after(PATIENCE):
            while process.poll() is None:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.02)
        assert process.poll() is None, f"{command[0]} ended"
        yield process


async def run(command: list[str], seconds: float = 60.0, **options: Any) -> str:
    """Run a program, which must succeed within `seconds`; returns its output."""
    with trio.fail_after(seconds):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, **options)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr.decode()}"
    return done.stdout.decode(errors="replace")


def tunnel_command(*arguments: str) -> list[str]:
    """Return a command line of `tunnel`, of the checkout under test."""
    return [sys.executable, "-c", "import sys; from tunneld.cli.tunnel import main; sys.exit(main())", *arguments]
