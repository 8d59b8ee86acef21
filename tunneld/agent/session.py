"""What an agent asks of the relay about a tunnel that it has opened: is it there, trim its pool, close it.

The agent does not `watch` its tunnel: that costs the relay and the agent an event for each step of each visitor, and
the pool knows as fast. When the tunnel or the relay goes, the kernel ends every parked connection; that is *trouble*,
and trouble makes the keeper ask at once. Where nobody is left to end connections (a cable is pulled), the question that
is asked anyway every `RESIZE_INTERVAL` seconds finds out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.backoff import delays
from tunneld.agent.events import FAILURE_REPORTS, MAX_MESSAGES, Reporter
from tunneld.agent.handshake_pool import HandshakePool
from tunneld.agent.pool import RESIZE_INTERVAL, Pool
from tunneld.agent.request import OpenTunnel, TunnelRequest, open_tunnel
from tunneld.agent.source import ConnectionSource, SourceEvents, Take
from tunneld.client import Client
from tunneld.engine.engine import Engine, FailureCallback
from tunneld.errors import NoSuchTunnelError, RefusedError, TunneldError
from tunneld.net.dial import resolve_relay
from tunneld.net.endpoint import Endpoint
from tunneld.policy.rates import LogLimiter

WEBMUX = frozenset({"webmux", "webmuxs"})
"""Schemes of server URIs to which carriers go."""
SETTLE = 0.1
"""Seconds for the end of parked connections and the headers of visitors that got some to come, and for connections that
were being dialled to arrive at the relay, before it is asked to trim again.
"""
ROUNDS = 10
"""How often it is asked: with a second and ten round trips, what is left of the parked connections leads nowhere."""


@dataclass(frozen=True, slots=True)
class AgentContext:
    """What every tunnel of an agent stands on."""

    engine: Engine
    nursery: trio.Nursery
    relay: RelayAccess
    teller: Reporter
    hurry: Callable[[], None] = lambda: None  # what ends a wait for the relay early


class TunnelSession:
    """One open tunnel and its supply of connections, looked after over a control connection (or, after a loss, over the
    next one).
    """

    def __init__(self, tunnel: OpenTunnel, supply: ConnectionSource, teller: Reporter, news: Alarm) -> None:
        """Made by `start`."""
        self.tunnel = tunnel
        self.supply = supply
        self._teller = teller
        self._news = news
        self._wanted = False  # visitors are
        self._waits: Iterator[float] = delays(random.random)
        self._repeats = LogLimiter(FAILURE_REPORTS, MAX_MESSAGES)

    @classmethod
    async def start(
        cls, client: Client, ground: AgentContext, wish: TunnelRequest, *, take: Take, failed: FailureCallback
    ) -> TunnelSession:
        """Open a tunnel and a supply for it; nobody comes before `resume`. Raises `RefusedError`,
        `RelayUnreachableError`, ... as any call.
        """
        tunnel = await open_tunnel(client, wish.options, wish.backend)
        news = Alarm()
        owner = SourceEvents(take, news.report, failed, ground.hurry)
        try:
            supply = await _supply(tunnel.server, ground, wish, owner)
        except TunneldError:
            await client.close(tunnel.id)
            raise
        return cls(tunnel, supply, ground.teller, news)

    def resume(self) -> None:
        """Have visitors come, from now on or again."""
        self._wanted = True
        self.supply.resume()

    def withdraw(self) -> None:
        """Have no more visitors come for now, once the relay knows; those who are here, or on their way, go on."""
        self._wanted = False
        self.supply.withdraw()
        self._news.stir()

    async def check(self, client: Client) -> None:
        """Raise `NoSuchTunnelError` unless the tunnel is open and takes visitors; `RefusedError` with the code `ended`
        where somebody at the relay closed or drains it on purpose; and what else a call raises.
        """
        record: Mapping[str, str] = {}
        with _unless_gone():
            record = (await client.show(str(self.tunnel.server)))[0]
        if not self.tunnel.is_described_by(record):
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} was closed at the relay")
        if record.get("phase") == "draining":
            await self._why_drained(client)
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} is being drained at the relay")

    async def _why_drained(self, client: Client) -> None:
        """Raise what the relay says to that, unless it is that there is no such tunnel."""
        with _unless_gone():
            await client.get_tunnel_address(str(self.tunnel.server))

    async def come_back(self, client: Client) -> None:
        """The tunnel stands, and we are back, perhaps at another address: what was parked from the old one leads
        nowhere, and neither end can tell. Nobody comes before `resume`. Raises as `check`.
        """
        try:
            await client.call("join", self.tunnel.id)
        except RefusedError as error:
            if error.reply_code != NoSuchTunnelError.code:
                raise
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} was closed at the relay") from None
        if self.supply.size:
            self.withdraw()
            await self._recall(client)

    async def close_tunnel(self, client: Client, *, shared: bool) -> None:
        """Serve this tunnel no more. It is drained at the relay, or, if it is `shared` and others serve it, left to
        them; for that they have to be told apart from our carriers. Raises as any call.
        """
        self.withdraw()
        if shared:
            await self.supply.wait_withdrawn()
        await client.call("leave", self.tunnel.id)

    async def settle(self, client: Client) -> None:
        """Wait, after `leave`, until those who were on their way are here. Raises as any call."""
        await self.supply.wait_withdrawn()
        await self._recall(client)

    async def keep(self, client: Client) -> None:
        """Look after the tunnel until it is gone, which an exception says: see `check`."""
        while True:
            with trio.move_on_after(RESIZE_INTERVAL):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._end_with, client, nursery.cancel_scope)
                    await self._news.wait()
                    nursery.cancel_scope.cancel()
            if not self._wanted and self.supply.parked:
                await self._recall(client)
            elif (reason := self._news.take()) is not None:
                await self._mend(client, reason)
            else:
                self._waits = delays(random.random)
                await self._review(client)

    async def _end_with(self, client: Client, waiting: trio.CancelScope) -> None:
        """The relay hung up: no need to wait until we ask it something."""
        await client.wait_lost()
        waiting.cancel()

    async def _review(self, client: Client) -> None:
        """Nothing happened for a while: is the relay there, and is the pool larger than it needs to be?"""
        if self.supply.resize():
            await client.call("trim", self.tunnel.id, str(self.supply.size))
        else:
            await self._ask(client)

    async def _ask(self, client: Client) -> None:
        """Does the tunnel still take visitors? Raises as `check` does."""
        try:
            await client.get_tunnel_address(str(self.tunnel.server))
        except RefusedError as error:
            if error.reply_code != NoSuchTunnelError.code:
                raise
            await self.check(client)

    async def _recall(self, client: Client) -> None:
        """Have the relay let go of what is parked until nothing is, or visitors are wanted again. Only the relay knows
        which of these connections no visitor got: one that is closed from here may have one already.
        """
        for _ in range(ROUNDS):
            if self._wanted or not self.supply.parked:
                return
            with _unless_gone():  # if it is, all this is about to end
                await client.call("trim", self.tunnel.id, "0")
            with trio.move_on_after(SETTLE):
                await self.supply.wait_closed()
        if not self._wanted:
            self.supply.close()

    async def _mend(self, client: Client, reason: str) -> None:
        """Parked connections ended: if the tunnel stands, dial again, ever more slowly while they do not last."""
        await self.check(client)
        repeated = self._repeats.passes(trio.current_time(), reason)
        if repeated is not None:
            what = f"{self.supply.description} to {self.tunnel.server.without_key}: {reason}"
            self._teller.report("trouble", reason=what, repeated=repeated)
        await trio.sleep(next(self._waits))
        if self._wanted:
            self.supply.resume()


@contextmanager
def _unless_gone() -> Iterator[None]:
    """What the relay refuses in the block is raised, but that there is no such tunnel: then the block is left."""
    try:
        yield
    except RefusedError as error:
        if error.reply_code != NoSuchTunnelError.code:
            raise


async def _supply(server: Endpoint, ground: AgentContext, wish: TunnelRequest, owner: SourceEvents) -> ConnectionSource:
    """Connections to a server URI of either kind. Raises `RelayUnreachableError`, `UsageError`."""
    if server.scheme in WEBMUX:
        from tunneld.agent.carriers import Carriers  # noqa: PLC0415  # on systems that have carriers

        return Carriers(ground.engine, ground.relay, server, owner, ground.nursery, keep_header=wish.keep_header)
    if server.key:
        return HandshakePool(
            ground.engine, ground.relay, server, wish.limits, owner, ground.nursery, keep_header=wish.keep_header
        )
    address = await resolve_relay(server.host, server.port)
    return Pool(ground.engine, address, wish.limits, owner, keep_header=wish.keep_header)


class Alarm:
    """What a keeper is to look at, from other tasks."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._trouble: str | None = None

    def stir(self) -> None:
        """Something is to be done."""
        self._event.set()

    def report(self, trouble: str) -> None:
        """The supply has lost connections, and why."""
        self._trouble = trouble
        self._event.set()

    async def wait(self) -> None:
        """Wait for the next."""
        await self._event.wait()
        self._event = trio.Event()

    def take(self) -> str | None:
        """Why connections were lost, if any were; told once."""
        trouble, self._trouble = self._trouble, None
        return trouble
