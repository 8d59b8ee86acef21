"""A tunnel of each backend with its real client, behind one interface: conformance tests need not know the backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from tests.agent.support import BACKEND, Handler, RecordingReporter, RelayHere, exposed, local_server, relay_here
from tests.backends.ssh.support import Relay, client, openssh, relay
from tunneld.agent.request import TunnelRequest
from tunneld.directory.service import TunnelService
from tunneld.net.endpoint import Endpoint, Target
from tunneld.tls.identity import Identity
from tunneld.tunnel.tunnel import Tunnel

LOCAL = "127.0.0.1"


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
                made = AgentTunnel(there, target, nursery)
                await made.connect()
                yield made
                made.disconnect()


@asynccontextmanager
async def tunnel_with(backend: str, handler: Handler) -> AsyncIterator[BackendTunnel]:
    """A tunnel to a local server that calls `handler` with each connection."""
    async with local_server(handler, backlog=1024) as target, tunnel_to(backend, target) as made:
        yield made
