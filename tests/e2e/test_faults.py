"""A program is killed or hangs: the address stays the same, and no acknowledged byte is lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from benchmarks.witness import BLOCK, block, proven
from tests.support.exposed import VARIANTS, agent_of
from tests.support.peers import PATIENCE, connect, read_exactly
from tests.support.pki import Pki
from tests.support.programs import TLS, free_port, lasting_port, listening
from tunneld.net.endpoint import Endpoint

LONG = 3 * PATIENCE
"""Seconds for two interpreters to start and the agent to retry, on a busy machine."""

CONFIG = """
[control]
port = {control}
[http]
enabled = false
[webmux]
port = {carriers}
[egtp]
enabled = {egtp}
port = {nodes}
resume_timeout = 1.0
[tunnels]
ports = "{first}-{client}"
[daemon]
state = "{folder}/state"
"""


class World:
    """A relay with fixed ports, an agent, and a server that stores what it acknowledges."""

    def __init__(self, folder: Path, way: str) -> None:
        self.folder, self.way = folder, way
        self.pki = Pki.issue(folder / "pki") if way == "webmuxs" else None

    def choose_ports(self) -> None:
        """Choose free ports. The server port of a tcp tunnel is next to its client port."""
        self.client = lasting_port()
        tunnels = range(self.client - 20, self.client + 1)
        outside = (port for port in iter(lasting_port, 0) if port not in tunnels)
        self.control = next(outside)
        ports = {"control": self.control, "carriers": next(outside), "nodes": next(outside), "client": self.client}
        egtp = "true" if self.way == "egtp" else "false"
        tls = TLS.format(folder=self.pki.folder) if self.pki else ""
        (self.folder / "tunnel.toml").write_text(
            CONFIG.format(folder=self.folder, egtp=egtp, first=tunnels[0], **ports) + tls
        )

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[trio.Process]:
        command = [sys.executable, "-m", "tunneld", "--config", f"{self.folder}/tunnel.toml"]
        async with listening(command, self.control) as process:
            yield process

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[trio.Process]:
        where = f"{'tls' if self.pki else 'tcp'}://127.0.0.1:{self.control}"
        trust = ["--pin", self.pki.pin] if self.pki else []
        words = ["--name", "web", "--port", str(self.client), "--backend", self.way.removesuffix("s")]
        async with agent_of(str(self.port), "--relay", where, *trust, *words) as (process, address):
            assert address.port == self.client
            yield process

    @asynccontextmanager
    async def server(self) -> AsyncIterator[None]:
        self.port = await free_port()
        command = [sys.executable, "-m", "benchmarks.witness", "serve", str(self.port), str(self.folder)]
        async with listening(command, self.port):
            yield

    async def until_served(self) -> None:
        """Visit repeatedly until a visitor is served."""
        with trio.fail_after(LONG):
            while not await self._visit():
                pass

    async def _visit(self) -> bool:
        with trio.move_on_after(1):
            try:
                async with await trio.open_tcp_stream("127.0.0.1", self.client) as visitor:
                    await visitor.send_all(b"p")
                    return await visitor.receive_some(1) == b"P"
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.05)
        return False


class Upload:
    """An upload of a visitor in blocks. `acknowledged` is the number of bytes that the server has confirmed."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._sent = self.acknowledged = 0

    @classmethod
    async def begin(cls, world: World) -> Upload:
        stream = await connect(Endpoint("tcp", "127.0.0.1", world.client))
        await stream.send_all(b"uupload\n")
        return cls(stream)

    async def send(self, blocks: int) -> None:
        for _ in range(blocks):
            await self._stream.send_all(block(self._sent // BLOCK))
            self._sent += BLOCK

    async def settle(self) -> None:
        """Wait until everything that was sent is acknowledged."""
        while self.acknowledged < self._sent:
            total = await read_exactly(self._stream, 8)
            assert len(total) == 8, "it was cut"
            self.acknowledged = int.from_bytes(total, "big")

    async def is_cut(self) -> bool:
        """Whether the connection ends."""
        try:
            while chunk := await self._stream.receive_some():
                self.acknowledged = max(self.acknowledged, int.from_bytes(chunk[-8:], "big"))
        except trio.BrokenResourceError:
            pass
        return True


@pytest.mark.parametrize("way", VARIANTS)
@pytest.mark.parametrize("who", ["daemon", "agent"])
async def test_after_a_kill_and_a_restart_the_address_is_the_same(tmp_path: Path, way: str, who: str) -> None:
    world = World(tmp_path, way)
    world.choose_ports()
    async with world.server(), AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(world.daemon())
        agent = await stack.enter_async_context(world.agent())
        await world.until_served()
        upload = await Upload.begin(world)
        await upload.send(100)
        await upload.settle()
        await upload.send(1)
        victim = daemon if who == "daemon" else agent
        victim.kill()
        await victim.wait()
        with trio.fail_after(LONG):
            assert await upload.is_cut()
        await stack.enter_async_context(world.daemon() if who == "daemon" else world.agent())
        await world.until_served()
        assert proven(tmp_path / "upload") >= upload.acknowledged >= 100 * BLOCK


@pytest.mark.parametrize("way", VARIANTS)
@pytest.mark.parametrize("who", ["daemon", "agent"])
async def test_a_program_that_hangs_for_a_moment_loses_no_data(tmp_path: Path, way: str, who: str) -> None:
    world = World(tmp_path, way)
    world.choose_ports()
    async with world.server(), world.daemon() as daemon, world.agent() as agent:
        await world.until_served()
        upload = await Upload.begin(world)
        await upload.send(100)
        victim = daemon if who == "daemon" else agent
        victim.send_signal(signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.send, 400)
            await trio.sleep(0.5)
            victim.send_signal(signal.SIGCONT)
        with trio.fail_after(LONG):
            await upload.settle()
        assert proven(tmp_path / "upload") == 500 * BLOCK
