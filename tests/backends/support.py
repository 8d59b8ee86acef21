"""A tunnel of each backend with its real client, behind one interface: conformance tests need not know the backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import trio

from tests.agent.support import BACKEND, Handler, RecordingReporter, RelayHere, exposed, local_server, relay_here
from tests.backends.ssh.support import Relay, client, openssh, relay
from tests.support.private import Visiting, privately_exposed, visit_port
from tunneld.agent.request import TunnelRequest
from tunneld.directory.service import TunnelService
from tunneld.net.endpoint import Endpoint, Target
from tunneld.tls.identity import Identity
from tunneld.tunnel.tunnel import Tunnel

LOCAL = "127.0.0.1"
PRIVATE: ContextVar[Path | None] = ContextVar("PRIVATE", default=None)
"""The folder with the keys of private tunnels, where those are to be tested; see `tests.support.private.make_home`."""


class BackendTunnel(ABC):
    """A tunnel from a relay to a local server. Its client, the agent or ssh, can be lost and reconnect."""

    def __init__(self, service: TunnelService, target: Target, nursery: trio.Nursery) -> None:
        self.service = service
        self.target = target
        self.address: Endpoint
        self._nursery = nursery
        self._client_scope = trio.CancelScope()

    @property
    def tunnel(self) -> Tunnel:
        """The only open tunnel."""
        (tunnel,) = self.service.tunnels()
        return tunnel

    async def connect(self) -> None:
        """Start the client, for the first time or again, and wait until the relay has its connection."""
        self._client_scope = await self._nursery.start(self._run)
        await self.until(lambda: any(tunnel.parked for tunnel in self.service.tunnels()))
        self.address = self.tunnel.client_uri

    def disconnect(self) -> None:
        """Kill the client, without a disconnect message."""
        self._client_scope.cancel()

    async def _run(self, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with self.client():
                task_status.started(scope)
                await trio.sleep_forever()

    @abstractmethod
    def client(self) -> AbstractAsyncContextManager[None]:
        """A running client, for the length of a block."""

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        """Poll a condition of the relay."""
        while not condition():
            await trio.lowlevel.checkpoint()


class AgentTunnel(BackendTunnel):
    """A tunnel whose client is `tunnel expose`, in this process."""

    def __init__(self, here: RelayHere, target: Target, nursery: trio.Nursery) -> None:
        super().__init__(here.service, target, nursery)
        self._here = here

    @asynccontextmanager
    async def client(self) -> AsyncIterator[None]:
        async with exposed(
            self.target, self._here.access, RecordingReporter(wants_visitors=False), request_of(BACKEND.get())
        ):
            yield


def request_of(backend: str) -> TunnelRequest:
    """What the agent asks for: egtp only if it is told so, and then with a key."""
    if backend == "egtp":
        return TunnelRequest({"name": "the-one"}, backend="egtp", identity=Identity.create())
    return TunnelRequest({"name": "the-one"})


class SshTunnel(BackendTunnel):
    """A tunnel whose client is OpenSSH's, a process."""

    def __init__(self, here: Relay, target: Target, nursery: trio.Nursery) -> None:
        super().__init__(here.service, target, nursery)
        self._here = here

    @asynccontextmanager
    async def client(self) -> AsyncIterator[None]:
        forward = f"0:{self.target.host}:{self.target.port}"
        async with client(openssh(self._here, "-N", "-R", forward, LOCAL)) as ssh:
            await ssh.port()
            yield


class PrivateEnds:
    """What the suite asks of a `Tunnel`, of the visiting end of a private one: the relay cannot tell streams apart."""

    def __init__(self, tunnel: Tunnel, visiting: Visiting) -> None:
        self._tunnel = tunnel
        self._reporter = visiting.reporter
        self.visitors = visiting.port._relays
        self.waiting = ()

    @property
    def served(self) -> int:
        return len(self._reporter.all("visiting"))

    @property
    def octets(self) -> tuple[int, int]:
        left = self._reporter.all("left")
        return sum(int(one["up"]) for one in left), sum(int(one["down"]) for one in left)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the relay's."""
        return getattr(self._tunnel, name)


class PrivateTunnel(AgentTunnel):
    """A private tunnel: its client is `tunnel expose --private`, and its address that of `tunnel visit`."""

    def __init__(self, here: RelayHere, target: Target, nursery: trio.Nursery, keys: Path) -> None:
        super().__init__(here, target, nursery)
        self._keys = keys
        self._visiting: Visiting | None = None

    @property
    def tunnel(self) -> Any:
        assert self._visiting is not None
        return PrivateEnds(super().tunnel, self._visiting)

    async def connect(self) -> None:
        self._client_scope = await self._nursery.start(self._run)
        await self.until(lambda: any(tunnel.parked for tunnel in self.service.tunnels()))
        if self._visiting is None:
            self._visiting = await self._nursery.start(self._visit)
            self.address = Endpoint("tcp", *self._visiting.address)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[None]:
        reporter = RecordingReporter(wants_visitors=False)
        async with privately_exposed(self.target, self._here.access, reporter, self._keys, "bob"):
            yield

    async def _visit(self, *, task_status: trio.TaskStatus[Visiting]) -> None:
        async with visit_port(self._here.access) as visiting:
            task_status.started(visiting)
            await trio.sleep_forever()


@asynccontextmanager
async def tunnel_to(backend: str, target: Target) -> AsyncIterator[BackendTunnel]:
    """A tunnel to this local server, with its client connected."""
    async with trio.open_nursery() as nursery:
        made: BackendTunnel
        if backend == "ssh":
            async with relay() as here:
                made = SshTunnel(here, target, nursery)
                await made.connect()
                yield made
                made.disconnect()
        else:
            async with relay_here() as there:
                keys = PRIVATE.get()
                made = PrivateTunnel(there, target, nursery, keys) if keys else AgentTunnel(there, target, nursery)
                await made.connect()
                yield made
                made.disconnect()
                if keys:
                    nursery.cancel_scope.cancel()


@asynccontextmanager
async def tunnel_with(backend: str, handler: Handler) -> AsyncIterator[BackendTunnel]:
    """A tunnel to a local server that calls `handler` with each connection."""
    async with local_server(handler, backlog=1024) as target, tunnel_to(backend, target) as made:
        yield made
