"""A real relay and a real agent in front of a hidden server, for each backend.

visitor ──► tunneld ◄── tcp: a connection each; webmux: one for all; webmuxs: with TLS ── tunnel expose ──► server
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import trio

from tests.support.peers import PATIENCE
from tests.support.pki import Pki
from tests.support.programs import Daemon, daemon, program, tunnel_command
from tunneld.net.endpoint import Endpoint

VARIANTS = ("tcp", "webmux", "webmuxs")


@dataclass
class Exposed:
    """An exposed server."""

    address: Endpoint
    relay: Daemon
    agent: trio.Process

    def url(self, path: str = "/", scheme: str = "http") -> str:
        """Return a URL for visitors."""
        return f"{scheme}://{self.address.authority}{path}"


@asynccontextmanager
async def exposed(way: str, folder: Path, target: str, *options: str) -> AsyncIterator[Exposed]:
    """Run `tunneld` and `tunnel expose TARGET`; the tunnel is open when the block begins."""
    pki = Pki.issue(folder / "pki") if way == "webmuxs" else None
    async with daemon(folder, pki=pki) as relay:
        trust = ["--pin", pki.pin] if pki else []
        where = ["--relay", relay.control, *trust, "--backend", way.removesuffix("s")]
        async with agent_of(target, *where, *options) as (agent, address):
            yield Exposed(address, relay, agent)


@asynccontextmanager
async def agent_of(
    *words: str, stderr: int | IO[bytes] = subprocess.DEVNULL
) -> AsyncIterator[tuple[trio.Process, Endpoint]]:
    """Run `tunnel expose`; yields its process and the public address that it printed."""
    command = tunnel_command("expose", *words)
    async with program(command, stdout=subprocess.PIPE, stderr=stderr) as agent:
        assert agent.stdout is not None
        line = b""
        with trio.fail_after(PATIENCE):
            while not line.endswith(b"\n"):
                octets = await agent.stdout.receive_some(1)
                assert octets, "the agent ended"
                line += octets
        yield agent, Endpoint.parse(line.decode().strip())
