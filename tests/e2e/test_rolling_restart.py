"""Two agents share a tunnel, and each is restarted under load: no visitor is lost."""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.agent.support import local_server
from tests.e2e.test_same_address import Agent, agent
from tests.support.peers import PATIENCE
from tests.support.programs import EGTP, Daemon, daemon
from tunneld.net.endpoint import Endpoint, Target

LONG = 6 * PATIENCE
"""Seconds of real time for the whole test, on a busy machine."""
DOWNLOAD = random.Random(4).randbytes(4 << 20)
FIRST = 1 << 20
"""Bytes of a download that are sent before the server waits for the signal to the agent."""


@dataclass
class Server:
    """A hidden server with a short response, and a download that pauses in the middle."""

    word: bytes
    asked: int = 0
    downloading: trio.Event = field(default_factory=trio.Event)
    go_on: trio.Event = field(default_factory=trio.Event)

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            what = await stream.receive_some(1)
            if not what:  # the story is over, and its visitors left; those it is about tell what they got
                return
            if what == b"s":
                self.asked += 1
                await stream.send_all(self.word)
                return
            await stream.send_all(DOWNLOAD[:FIRST])
            self.downloading.set()
            await self.go_on.wait()
            await stream.send_all(DOWNLOAD[FIRST:])


@dataclass
class Crowd:
    """Visitors one after another, and the responses that they got."""

    heard: list[bytes] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def come(self, address: Endpoint) -> None:
        while True:
            try:
                self.heard.append(await visit(address, b"s"))
            except (OSError, trio.BrokenResourceError) as error:
                self.failures.append(repr(error))
                continue
            if self.heard[-1] == b"":
                self.failures.append("nothing was heard")


async def visit(address: Endpoint, question: bytes) -> bytes:
    """Not by `connect`: a crowd that never yields has one agent's pool grow until the other hardly gets a visitor."""
    stream = await trio.open_tcp_stream(address.host, address.port)
    async with stream:
        await stream.send_all(question)
        return b"".join([chunk async for chunk in stream])


async def members(relay: Daemon, count: int) -> str:
    """Wait until the tunnel has this many agents; returns its line in `list`."""
    while True:
        (item,) = [line for line in (await relay.ask("list")).splitlines() if line.startswith("* ")]
        if f"agents={count}" in item.split():
            return item
        await trio.sleep(0.05)


async def until(holds: Callable[[], bool]) -> None:
    while True:
        if holds():
            return
        await trio.sleep(0.01)


async def until_somewhere_else(server: Server, crowd: Crowd) -> None:
    """Wait until a hundred visitors were served without one of them reaching this server."""
    while True:
        asked, heard = server.asked, len(crowd.heard)
        await until(lambda: len(crowd.heard) >= heard + 100)  # noqa: B023 - called before the next turn
        if server.asked == asked:
            return


async def download(address: Endpoint, downloads: list[str]) -> None:
    try:
        downloads.append(hashlib.sha256(await visit(address, b"l")).hexdigest())
    except trio.BrokenResourceError:
        downloads.append("cut")


@pytest.mark.parametrize("backend", ["webmux", "tcp", "egtp"])
async def test_a_rolling_restart_of_two_agents_loses_no_visitor(tmp_path: Path, backend: str) -> None:
    one, two, crowd = Server(b"one"), Server(b"two"), Crowd()
    downloads: list[str] = []

    with trio.fail_after(LONG):
        async with (
            daemon(tmp_path, words=EGTP) as relay,
            local_server(one.serve) as first,
            local_server(two.serve) as second,
            trio.open_nursery() as nursery,
        ):

            async def start(target: Target) -> Agent:
                started: Agent = await nursery.start(keep, relay, target, backend)
                return started

            agents = {b"one": await start(first), b"two": await start(second)}
            address = await agents[b"one"].address()
            assert await agents[b"two"].address() == address
            await members(relay, 2)
            for _ in range(3):
                nursery.start_soon(crowd.come, address)
            for server, target in ((one, first), (two, second)):
                while not server.downloading.is_set():  # which of them serves it is the relay's choice
                    nursery.start_soon(download, address, downloads)
                    await trio.sleep(0.2)
                leaving = agents[server.word]
                leaving.process.send_signal(signal.SIGTERM)
                await members(relay, 1)
                await until_somewhere_else(server, crowd)
                assert leaving.process.returncode is None
                server.go_on.set()
                assert await leaving.process.wait() == 0
                agents[server.word] = again = await start(target)
                assert await again.address() == address
                await members(relay, 2)
                before = server.asked
                await until(lambda: server.asked > before)  # noqa: B023 - called before the next turn
            nursery.cancel_scope.cancel()
    assert not crowd.failures
    assert len(downloads) >= 2
    assert set(downloads) == {hashlib.sha256(DOWNLOAD).hexdigest()}
    assert set(crowd.heard) == {b"one", b"two"}


async def test_a_second_signal_cuts_the_remaining_visitors(tmp_path: Path) -> None:
    server, downloads = Server(b"one"), list[str]()
    with trio.fail_after(LONG):
        async with daemon(tmp_path) as relay, local_server(server.serve) as target, trio.open_nursery() as nursery:
            running: Agent = await nursery.start(keep, relay, target, "webmux")
            address = await running.address()
            nursery.start_soon(download, address, downloads)
            await server.downloading.wait()
            running.process.send_signal(signal.SIGTERM)
            await relay.wait_logged("tunnel draining")
            assert running.process.returncode is None
            running.process.send_signal(signal.SIGTERM)
            assert await running.process.wait() == 0
            await relay.wait_logged("tunnel closed")
            while not downloads:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert downloads != [hashlib.sha256(DOWNLOAD).hexdigest()]


async def keep(relay: Daemon, target: Target, backend: str, *, task_status: trio.TaskStatus[Agent]) -> None:
    """Run an agent, and kill it at the end if it still runs."""
    async with agent(relay.control_port, target, backend, "--share") as running:
        task_status.started(running)
        await trio.sleep_forever()
