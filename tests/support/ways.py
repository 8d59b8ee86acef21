"""The ways from a visitor to a hidden server: a real relay and a real agent, as a person starts them.

visitor ──► tunneld ◄── tcp: a connection each; webmux: one for all; webmuxs: that in TLS ── tunnel expose ──► server
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.support.papers import Papers
from tests.support.people import PATIENCE
from tests.support.programs import Daemon, daemon, program, tunnel_command
from tunneld.net.endpoint import Endpoint

WAYS = ("tcp", "webmux", "webmuxs")


@dataclass
class Exposed:
    """A server that visitors reach."""

    address: Endpoint
    relay: Daemon
    agent: trio.Process

    def url(self, path: str = "/", scheme: str = "http") -> str:
        """What a visitor types."""
        return f"{scheme}://{self.address.authority}{path}"


@asynccontextmanager
async def exposed(way: str, folder: Path, target: str, *options: str) -> AsyncIterator[Exposed]:
    """`tunneld` and `tunnel expose TARGET`, from when the public address is known."""
    papers = Papers.issue(folder / "papers") if way == "webmuxs" else None
    async with daemon(folder, papers=papers) as relay:
        trust = ["--pin", papers.pin] if papers else []
        where = ["--relay", relay.control, *trust, "--backend", way.removesuffix("s")]
        async with agent_of(target, *where, *options) as (agent, address):
            yield Exposed(address, relay, agent)


@asynccontextmanager
async def agent_of(*words: str) -> AsyncIterator[tuple[trio.Process, Endpoint]]:
    """`tunnel expose`, and the public address that it printed."""
    command = tunnel_command("expose", *words)
    async with program(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as agent:
        assert agent.stdout is not None
        line = b""
        with trio.fail_after(PATIENCE):
            while not line.endswith(b"\n"):
                octets = await agent.stdout.receive_some(1)
                assert octets, "the agent ended"
                line += octets
        yield agent, Endpoint.parse(line.decode().strip())
