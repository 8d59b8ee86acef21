"""A real relay and a real agent in front of a hidden server, for each backend.

visitor ──► tunneld ◄── tcp: a connection each; webmux: one for all; webmuxs: with TLS; egtp ── tunnel expose ──► server
client ──► tunnel visit ──► tunneld ◄── the same, with private- in front ── tunnel expose --private ──► server
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import trio

from tests.support.peers import PATIENCE
from tests.support.pki import Pki
from tests.support.programs import EGTP, Daemon, daemon, program, run, tunnel_command
from tunneld.net.endpoint import Endpoint

VARIANTS = ("tcp", "webmux", "webmuxs", "egtp")
PRIVATE = "private-"


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
    if way.startswith(PRIVATE):
        async with privately_exposed(way.removeprefix(PRIVATE), folder, target, *options) as server:
            yield server
        return
    pki = Pki.issue(folder / "pki") if way == "webmuxs" else None
    async with daemon(folder, pki=pki, words=EGTP if way == "egtp" else "") as relay:
        trust = ["--pin", pki.pin] if pki else []
        where = ["--relay", relay.control, *trust, "--backend", way.removesuffix("s")]
        async with agent_of(target, *where, *options) as (agent, address):
            yield Exposed(address, relay, agent)


@asynccontextmanager
async def privately_exposed(way: str, folder: Path, target: str, *options: str) -> AsyncIterator[Exposed]:
    """Run `tunneld`, `tunnel expose --private` of alice and `tunnel visit` of bob, whose port is the address."""
    pki = Pki.issue(folder / "pki") if way == "webmuxs" else None
    async with daemon(folder, pki=pki) as relay:
        where = ["--relay", relay.control, *(["--pin", pki.pin] if pki else [])]
        await make_homes(folder)
        words = ["--private", "--name", "hidden", "--admit", "bob", "--backend", way.removesuffix("s"), *options]
        async with (
            agent_of(target, *where, *words, env=home(folder, "alice")) as (agent, _),
            agent_of("hidden@alice", *where, verb="visit", env=home(folder, "bob")) as (_, address),
        ):
            yield Exposed(address, relay, agent)


def home(folder: Path, name: str) -> dict[str, str]:
    """The environment of one of several users."""
    return {**os.environ, "XDG_CONFIG_HOME": f"{folder}/{name}", "XDG_STATE_HOME": f"{folder}/{name}/state"}


async def make_homes(folder: Path) -> None:
    """Alice, bob and carol have keys; alice and bob know each other, and carol knows alice."""
    ids = {
        name: (await run(tunnel_command("identity", "create"), env=home(folder, name))).strip()
        for name in ("alice", "bob", "carol")
    }
    for name, known in (("alice", "bob"), ("bob", "alice"), ("carol", "alice")):
        await run(tunnel_command("trust", "add", known, ids[known]), env=home(folder, name))


@asynccontextmanager
async def agent_of(
    *words: str,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    verb: str = "expose",
    env: dict[str, str] | None = None,
) -> AsyncIterator[tuple[trio.Process, Endpoint]]:
    """Run `tunnel expose` or `visit`; yields its process and the address that it printed."""
    command = tunnel_command(verb, *words)
    async with program(command, stdout=subprocess.PIPE, stderr=stderr, env=env) as agent:
        assert agent.stdout is not None
        line = b""
        with trio.fail_after(PATIENCE):
            while not line.endswith(b"\n"):
                octets = await agent.stdout.receive_some(1)
                assert octets, "the agent ended"
                line += octets
        text = line.decode().strip()
        yield agent, Endpoint.parse(text if "://" in text else f"tcp://{text}")
