"""A real relay under attack: a bystander whose tunnel must not notice, and the marks that an attack may leave: none.

besieged
├─ send                 a hidden server, as fast as it goes, hashing
└─ receive              its visitor, hashing too
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from tests.support.credentials import SECRET
from tests.support.papers import Papers
from tests.support.people import PATIENCE, connect
from tests.support.programs import TLS, Daemon, daemon
from tunneld import client
from tunneld.net.endpoint import Endpoint
from tunneld.wire.verifier import MIN_ITERATIONS, derive

KIB = 1024
MIB = 1024 * KIB

LIST_DEADLINE = 1.0
"""Seconds within which `list` answers whatever strangers do: the one promise about time."""

PER_CONNECTION = 64 * KIB
"""Octets of resident memory that one connection may add, wherever it is; tunneld(8), SECURITY, has the sum."""

PER_PROCESS = 32 * MIB
"""Octets that an attack may add beside: the allocator's arenas, modules that are loaded late."""

SPARE_DESCRIPTORS = 16
"""Pipes that the bystander's bulk has borrowed now and had not before; every attack opens far more."""

SPARE_TASKS = 8
"""An operator's connection that comes or goes just now; every attack that leaves tasks leaves far more."""

BLOCK = 64 * KIB
ADMIN = ("root", SECRET)


class Siege:
    """A relay and its bystander."""

    def __init__(self, relay: Daemon, folder: Path, papers: Papers | None) -> None:
        self.relay = relay
        self.control = Endpoint("tcp" if papers is None else "tls", "127.0.0.1", relay.control_port)
        self._tls = None if papers is None else papers.client
        self.http = Endpoint("tcp", "127.0.0.1", int(relay.http.rstrip("/").rpartition(":")[2]))
        self.progress = 0
        """Octets that the bystander has received."""
        self._config = folder / "tunnel.toml"
        self._credential: tuple[str, str] | None = None
        self._there: client.Client | None = None  # an operator who was there before the attack
        self._stopping = False

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[client.Client]:
        """Whoever looks after the relay: in TLS one who stays, since a newcomer is one among many strangers."""
        if self._there is not None:
            yield self._there
        else:
            async with self._connect() as operator:
                yield operator

    def _connect(self) -> AbstractAsyncContextManager[client.Client]:
        return client.connect(str(self.control), tls=self._tls, credential=self._credential)

    @asynccontextmanager
    async def stay(self) -> AsyncIterator[None]:
        """While the block runs the operator stays connected, where newcomers are strangers: they must authenticate, in
        TLS or with a secret.
        """
        if self._tls is None and self._credential is None:
            yield
            return
        async with self._connect() as operator:
            self._there = operator
            yield
            self._there = None

    async def tasks(self) -> int:
        """How many tasks the relay has."""
        async with self.operator() as operator:
            return int((await operator.status())["tasks"])

    async def set(self, table: str, line: str) -> None:
        """Add a line to a table of the configuration, and reload."""
        text = self._config.read_text()
        self._config.write_text(text.replace(f"[{table}]", f"[{table}]\n{line}"))
        async with self.operator() as operator:
            await operator.call("reload")

    async def ask_for_secrets(self) -> None:
        """From here on everybody must authenticate."""
        proof = derive(SECRET, b"salt", MIN_ITERATIONS).reveal()
        self._config.write_text(
            f'{self._config.read_text()}\n[[credential]]\nname = "{ADMIN[0]}"\nrole = "admin"\nverifier = "{proof}"\n'
        )
        async with self.operator() as operator:
            await operator.call("reload")
        self._credential = ADMIN

    async def opened(self, **options: str) -> tuple[Endpoint, Endpoint]:
        """Open a tunnel that persists: its server URI and its client URI."""
        async with self.operator() as operator:
            server = await operator.open_tunnel("tcp", persist="yes", **options)
            return Endpoint.parse(server), Endpoint.parse(await operator.get_tunnel_address(server))

    @asynccontextmanager
    async def ports(self) -> AsyncIterator[dict[str, Endpoint]]:
        """Every kind of port, for an attack; its tunnel is closed at the end, for what was said to it stays parked."""
        secure = {"secure": "yes"} if self._tls is not None else {}
        server, visitors = await self.opened(**secure)
        shared = Endpoint.parse((await self.relay.wait_logged("webmux listens"))["uri"])
        faces = {"control": self.control, "http": self.http, "webmux": shared}
        yield {**faces, "server": server, "client": visitors}
        async with self.operator() as operator:
            await operator.close(str(server))

    async def check_answers(self) -> float:
        """An operator who is there asks for the list; the seconds it took, below `LIST_DEADLINE`."""
        async with self.operator() as operator:
            began = trio.current_time()
            with trio.fail_after(LIST_DEADLINE):
                await operator.list()
            return trio.current_time() - began

    async def check_progress(self, octets: int = MIB) -> None:
        """The bystander receives so many octets more."""
        goal = self.progress + octets
        with trio.fail_after(PATIENCE):
            while self.progress < goal:
                await trio.lowlevel.checkpoint()

    async def check_calm(self, descriptors: int, tasks: int) -> None:
        """The relay comes back to as many descriptors and tasks as before; each question gives it time to."""
        with trio.fail_after(PATIENCE):
            while self.relay.descriptors > descriptors + SPARE_DESCRIPTORS or await self.tasks() > tasks + SPARE_TASKS:
                await self.check_answers()

    @property
    def resident(self) -> int:
        """Octets of memory that the relay has resident."""
        told = Path(f"/proc/{self.relay.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", told, re.MULTILINE)
        assert found is not None
        return int(found[1]) * KIB

    async def send(self, stream: trio.SocketStream, digest: hashlib._Hash) -> None:
        """The bystander's hidden server, until it is told to stop."""
        number = 0
        while not self._stopping:
            block = number.to_bytes(8, "big") * (BLOCK // 8)
            digest.update(block)
            await stream.send_all(block)
            number += 1
        await stream.send_eof()

    async def receive(self, stream: trio.SocketStream, digest: hashlib._Hash) -> None:
        """The bystander's visitor, to the end of file."""
        async for chunk in stream:
            digest.update(chunk)
            self.progress += len(chunk)

    def stop(self) -> None:
        """The bystander has sent enough."""
        self._stopping = True


@asynccontextmanager
async def besieged(folder: Path, papers: Papers | None = None, words: str = "") -> AsyncIterator[Siege]:
    """A relay whose bystander is at work, every face in TLS where there are papers. When the block ends, everything
    sent must have arrived. `words` is what its configuration says besides.
    """
    if papers is not None:
        words += TLS.format(folder=papers.folder).replace("control", "http")
    async with daemon(folder, papers=papers, words=words) as relay, AsyncExitStack() as stack:
        siege = Siege(relay, folder, papers)
        await stack.enter_async_context(siege.stay())
        server_uri, client_uri = await siege.opened()
        server, visitor = await connect(server_uri), await connect(client_uri)
        sent, received = hashlib.sha256(), hashlib.sha256()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(siege.send, server, sent)
            nursery.start_soon(siege.receive, visitor, received)
            await siege.check_progress()
            yield siege
            siege.stop()
            nursery.cancel_scope.deadline = trio.current_time() + PATIENCE
        assert not nursery.cancel_scope.cancelled_caught
        assert sent.digest() == received.digest()


@asynccontextmanager
async def under_attack(siege: Siege, connections: int) -> AsyncIterator[None]:
    """Once the block has ended the relay works and is as before; what holds during the attack, the block checks.

    `connections` is how many the attack holds at once, at most. The block must leave with nothing open.
    """
    descriptors, resident, tasks = siege.relay.descriptors, siege.resident, await siege.tasks()
    yield
    await siege.check_progress()
    await siege.check_answers()
    await siege.check_calm(descriptors, tasks)
    assert siege.resident - resident < PER_PROCESS + connections * PER_CONNECTION
