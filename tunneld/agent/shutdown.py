"""How an exposure ends, and how long that takes.

told to end ──► leave ──► those who are here finish ──► gone
                  │          until `drain_timeout`, or told to end again: then they are cut
                  the relay sends nobody any more: visitors go to other agents of a shared tunnel, or the tunnel is
                  drained at the relay as well, and its address stays reserved: a successor may open another one there
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.events import Field, Reporter
from tunneld.agent.session import TunnelSession
from tunneld.agent.visitors import LocalVisitors
from tunneld.client import Client
from tunneld.errors import TunneldError

CLOSE_WITHIN = 3.0
"""Seconds for the relay to hear that no more visitors are wanted; a person has pressed Ctrl-C and waits."""
DRAIN_WITHIN = 30.0
"""Seconds for visitors to finish: what the daemon gives them when it is told to end."""
FINISH_WITHIN = 5.0
"""Seconds more for the last octets that visitors left with us to reach the relay."""


class AgentShutdown:
    """The end of one exposure. Every step takes bounded time."""

    def __init__(
        self,
        relay: RelayAccess,
        visitors: LocalVisitors,
        teller: Reporter,
        on_left: Callable[[], None],
        *,
        shared: bool,
    ) -> None:
        """`on_left` is called once the relay sends nobody any more, or could not be told. `shared`: others may serve
        the tunnel as well.
        """
        self.reason = "told to stop"
        self.patience: float | None = None  # seconds that visitors have to finish, once it was said that they may
        self._relay = relay
        self._visitors = visitors
        self._teller = teller
        self._on_left = on_left
        self._shared = shared
        self._told = False  # the relay knows

    async def begin(self, client: Client, keeper: TunnelSession) -> None:
        """We are to end while this connection stands, by which the relay knows us: use it. Not stopped by being
        cancelled.
        """
        with trio.move_on_after(CLOSE_WITHIN, shield=True), suppress(TunneldError):
            await self._say_farewell(client, keeper, cut=self.patience is None)

    async def drain(self, keeper: TunnelSession | None) -> None:
        """Nobody new is wanted, which the relay may have to hear over a connection of its own; wait for those who are
        here.
        """
        if keeper is None:
            return
        if not self._told:
            keeper.supply.pause()
            with trio.move_on_after(CLOSE_WITHIN), suppress(TunneldError):
                async with self._relay.connect() as client:
                    await keeper.check(client)
                    await self._say_farewell(client, keeper, cut=False)
        self._on_left()
        if self._visitors.now:
            self._tell("draining", keeper, visitors=self._visitors.now, delay=self.patience or 0.0)
        with trio.move_on_after(self.patience or 0.0) as scope:
            await self._visitors.wait_none()
        if not scope.cancelled_caught:
            with trio.move_on_after(FINISH_WITHIN):
                await keeper.supply.wait_closed()

    async def outlast(self, keeper: TunnelSession | None) -> None:
        """The relay wants no more of us. Those whose connections it lets finish may, for as long as it does."""
        if keeper is not None and self._visitors.now:
            keeper.supply.pause()
            self._tell("draining", keeper, visitors=self._visitors.now)
            await self._visitors.wait_none()

    async def close(self, keeper: TunnelSession) -> None:
        """Cut whoever is left, close the tunnel at the relay, and tell. Its address stays ours; where others serve it,
        too, it stays open. Not stopped by being cancelled.
        """
        keeper.supply.pause()
        if not self._told:
            with trio.move_on_after(CLOSE_WITHIN, shield=True), suppress(TunneldError):
                async with self._relay.connect() as client:
                    await keeper.check(client)
                    await self._say_farewell(client, keeper, cut=True)
        self._visitors.drop()
        keeper.supply.close()
        visitors, (up, down) = self._visitors, self._visitors.octets
        counts = {"served": visitors.served, "failed": visitors.failed, "up": up, "down": down}
        self._tell("closed", keeper, reason=self.reason, **counts)

    async def _say_farewell(self, client: Client, keeper: TunnelSession, *, cut: bool) -> None:
        """The relay shall send us nobody any more; and those who are here finish, or are cut."""
        if cut and not self._shared:
            await client.close(keeper.tunnel.id, keep=True)
        else:
            await keeper.close_tunnel(client, shared=self._shared)
        self._told = True
        if not cut:
            await keeper.settle(client)

    def _tell(self, event: str, keeper: TunnelSession, **fields: Field) -> None:
        self._teller.report(event, id=keeper.tunnel.id, **fields)
