"""A hidden server behind each backend, as its real client makes it: the same to a test, whatever the backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from tests.agent.support import Handler, RecordingReporter, RelayHere, exposed, local_server, relay_here
from tests.backends.ssh.support import Relay, client, openssh, relay
from tunneld.agent.request import TunnelRequest
from tunneld.directory.service import TunnelService
from tunneld.net.endpoint import Endpoint, Target
from tunneld.tunnel.tunnel import Tunnel

LOCAL = "127.0.0.1"


class Way(ABC):
    """From visitors to a local server, over a relay; the hidden server's end can be lost, and come back."""

    def __init__(self, service: TunnelService, target: Target, nursery: trio.Nursery) -> None:
        self.service = service
        self.target = target
        self.address: Endpoint
        self._nursery = nursery
        self._hidden = trio.CancelScope()

    @property
    def tunnel(self) -> Tunnel:
        """The only one that is open."""
        (tunnel,) = self.service.tunnels()
        return tunnel

    async def come(self) -> None:
        """The hidden server's end connects, for the first time or again."""
        self._hidden = await self._nursery.start(self._run)
        await self.until(lambda: any(tunnel.parked for tunnel in self.service.tunnels()))
        self.address = self.tunnel.client_uri

    def lose(self) -> None:
        """It is gone, without a word to the relay."""
        self._hidden.cancel()

    async def _run(self, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with self.hidden():
                task_status.started(scope)
                await trio.sleep_forever()

    @abstractmethod
    def hidden(self) -> AbstractAsyncContextManager[None]:
        """The hidden server's end, for the length of a block."""

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        """Wait for something inside."""
        while not condition():
            await trio.lowlevel.checkpoint()


class AgentWay(Way):
    """`tunnel expose` in this process."""

    def __init__(self, here: RelayHere, target: Target, nursery: trio.Nursery) -> None:
        super().__init__(here.service, target, nursery)
        self._here = here

    @asynccontextmanager
    async def hidden(self) -> AsyncIterator[None]:
        async with exposed(
            self.target, self._here.access, RecordingReporter(wants_visitors=False), TunnelRequest({"name": "the-one"})
        ):
            yield


class SshWay(Way):
    """OpenSSH's client, a process."""

    def __init__(self, here: Relay, target: Target, nursery: trio.Nursery) -> None:
        super().__init__(here.service, target, nursery)
        self._here = here

    @asynccontextmanager
    async def hidden(self) -> AsyncIterator[None]:
        forward = f"0:{self.target.host}:{self.target.port}"
        async with client(openssh(self._here, "-N", "-R", forward, LOCAL)) as ssh:
            await ssh.port()
            yield


@asynccontextmanager
async def way_to(backend: str, target: Target) -> AsyncIterator[Way]:
    """A way to this local server; the hidden server's end has come."""
    async with trio.open_nursery() as nursery:
        made: Way
        if backend == "ssh":
            async with relay() as here:
                made = SshWay(here, target, nursery)
                await made.come()
                yield made
                made.lose()
        else:
            async with relay_here() as there:
                made = AgentWay(there, target, nursery)
                await made.come()
                yield made
                made.lose()


@asynccontextmanager
async def way(backend: str, handler: Handler) -> AsyncIterator[Way]:
    """The same; the local server does this with each visitor."""
    async with local_server(handler, backlog=1024) as target, way_to(backend, target) as made:
        yield made
