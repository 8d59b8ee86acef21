"""A real relay under attack, and a bystander with a tunnel that must not be affected.

attacked_relay
├─ send                 the bystander's hidden server, which sends as fast as possible and hashes
└─ receive              its visitor, which hashes, too

After an attack, the relay must use as much memory and as many descriptors and tasks as before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from tests.support.credentials import SECRET
from tests.support.peers import PATIENCE, connect
from tests.support.pki import Pki
from tests.support.programs import TLS, Daemon, daemon
from tunneld import client
from tunneld.net.endpoint import Endpoint
from tunneld.wire.verifier import MIN_ITERATIONS, derive

KIB = 1024
MIB = 1024 * KIB

LIST_DEADLINE = 1.0
"""Seconds within which `list` is answered during any attack."""

PER_CONNECTION = 64 * KIB
"""Bytes of resident memory that a connection to any port may add; see Resource usage in tunneld(8)."""

PER_PROCESS = 32 * MIB
"""Bytes that an attack may add in addition: arenas of the allocator, modules that are loaded late."""

SPARE_DESCRIPTORS = 16
"""Descriptors of pipes that the bystander's transfer may use in addition; every attack opens far more."""

SPARE_TASKS = 8
"""Tasks of an operator's connection that opens or closes just now; an attack that leaks tasks leaks far more."""

BLOCK = 64 * KIB
ADMIN = ("root", SECRET)


class AttackedRelay:
    """A relay under attack, and its bystander."""

    def __init__(self, relay: Daemon, folder: Path, pki: Pki | None) -> None:
        self.relay = relay
        self.control = Endpoint("tcp" if pki is None else "tls", "127.0.0.1", relay.control_port)
        self._tls = None if pki is None else pki.client
        self.http = Endpoint("tcp", "127.0.0.1", int(relay.http.rstrip("/").rpartition(":")[2]))
        self.progress = 0
        """Bytes that the bystander has received."""
        self._config = folder / "tunnel.toml"
        self._credential: tuple[str, str] | None = None
        self._there: client.Client | None = None  # an operator connected before the attack
        self._stopping = False

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[client.Client]:
        """Connect as the operator. Returns the connection of `stay`, if there is one."""
        if self._there is not None:
            yield self._there
        else:
            async with self._connect() as operator:
                yield operator

    def _connect(self) -> AbstractAsyncContextManager[client.Client]:
        return client.connect(str(self.control), tls=self._tls, credential=self._credential)

    @asynccontextmanager
    async def stay(self) -> AsyncIterator[None]:
        """Keep the operator connected for the length of the block if connections must authenticate or use TLS, since a
        new one could be refused during an attack.
        """
        if self._tls is None and self._credential is None:
            yield
            return
        async with self._connect() as operator:
            self._there = operator
            yield
            self._there = None

    async def tasks(self) -> int:
        """Return the number of tasks of the relay."""
        async with self.operator() as operator:
            return int((await operator.status())["tasks"])

    async def set(self, table: str, line: str) -> None:
        """Add a line to a table of the configuration, and reload."""
        text = self._config.read_text()
        self._config.write_text(text.replace(f"[{table}]", f"[{table}]\n{line}"))
        async with self.operator() as operator:
            await operator.call("reload")

    async def ask_for_secrets(self) -> None:
        """Configure a credential, so that connections must authenticate from here on."""
        proof = derive(SECRET, b"salt", MIN_ITERATIONS).reveal()
        self._config.write_text(
            f'{self._config.read_text()}\n[[credential]]\nname = "{ADMIN[0]}"\nrole = "admin"\nverifier = "{proof}"\n'
        )
        async with self.operator() as operator:
            await operator.call("reload")
        self._credential = ADMIN

    async def opened(self, **options: str) -> tuple[Endpoint, Endpoint]:
        """Open a persistent tunnel; returns its server URI and client URI."""
        async with self.operator() as operator:
            server = await operator.open_tunnel("tcp", persist="yes", **options)
            return Endpoint.parse(server), Endpoint.parse(await operator.get_tunnel_address(server))

    @asynccontextmanager
    async def ports(self) -> AsyncIterator[dict[str, Endpoint]]:
        """Yield ports of all kinds. The tunnel is closed at the end, since connections to it stay parked."""
        secure = {"secure": "yes"} if self._tls is not None else {}
        server, visitors = await self.opened(**secure)
        shared = Endpoint.parse((await self.relay.wait_logged("webmux listens"))["uri"])
        faces = {"control": self.control, "http": self.http, "webmux": shared}
        yield {**faces, "server": server, "client": visitors}
        async with self.operator() as operator:
            await operator.close(str(server))

    async def check_answers(self) -> float:
        """Call `list` as the operator. Returns the seconds it took; fails after `LIST_DEADLINE`."""
        async with self.operator() as operator:
            began = trio.current_time()
            with trio.fail_after(LIST_DEADLINE):
                await operator.list()
            return trio.current_time() - began

    async def check_progress(self, octets: int = MIB) -> None:
        """Wait until the bystander has received this many more bytes."""
        goal = self.progress + octets
        with trio.fail_after(PATIENCE):
            while self.progress < goal:
                await trio.lowlevel.checkpoint()

    async def check_calm(self, descriptors: int, tasks: int) -> None:
        """Wait until the relay has as many descriptors and tasks as before."""
        with trio.fail_after(PATIENCE):
            while self.relay.descriptors > descriptors + SPARE_DESCRIPTORS or await self.tasks() > tasks + SPARE_TASKS:
                await self.check_answers()

    @property
    def resident(self) -> int:
        """Resident memory of the relay in bytes."""
        told = Path(f"/proc/{self.relay.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", told, re.MULTILINE)
        assert found is not None
        return int(found[1]) * KIB

    async def send(self, stream: trio.SocketStream, digest: hashlib._Hash) -> None:
        """Send as the bystander's hidden server, until `stop`."""
        number = 0
        while not self._stopping:
            block = number.to_bytes(8, "big") * (BLOCK // 8)
            digest.update(block)
            await stream.send_all(block)
            number += 1
        await stream.send_eof()

    async def receive(self, stream: trio.SocketStream, digest: hashlib._Hash) -> None:
        """Receive as the bystander's visitor, until EOF."""
        async for chunk in stream:
            digest.update(chunk)
            self.progress += len(chunk)

    def stop(self) -> None:
        """Let the bystander stop sending."""
        self._stopping = True


@asynccontextmanager
async def attacked_relay(folder: Path, pki: Pki | None = None, words: str = "") -> AsyncIterator[AttackedRelay]:
    """Run a relay and a bystander with a transfer; with `pki`, all ports use TLS. When the block ends, everything
    sent must have arrived. `words` is added to the configuration.
    """
    if pki is not None:
        words += TLS.format(folder=pki.folder).replace("control", "http")
    async with daemon(folder, pki=pki, words=words) as relay, AsyncExitStack() as stack:
        target = AttackedRelay(relay, folder, pki)
        await stack.enter_async_context(target.stay())
        server_uri, client_uri = await target.opened()
        server, visitor = await connect(server_uri), await connect(client_uri)
        sent, received = hashlib.sha256(), hashlib.sha256()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.send, server, sent)
            nursery.start_soon(target.receive, visitor, received)
            await target.check_progress()
            yield target
            target.stop()
            nursery.cancel_scope.deadline = trio.current_time() + PATIENCE
        assert not nursery.cancel_scope.cancelled_caught
        assert sent.digest() == received.digest()


@asynccontextmanager
async def under_attack(target: AttackedRelay, connections: int) -> AsyncIterator[None]:
    """Check after the block that the relay works and uses no more resources than before.

    `connections` is the highest number of connections that the attack has open. The block must close all of them.
    """
    descriptors, resident, tasks = target.relay.descriptors, target.resident, await target.tasks()
    yield
    await target.check_progress()
    await target.check_answers()
    await target.check_calm(descriptors, tasks)
    assert target.resident - resident < PER_PROCESS + connections * PER_CONNECTION
