"""How an exposure ends, and how long that takes.

told to stop ──► leave ──► present visitors finish ──► closed
                   │         until `drain_timeout`, or told to stop again: then they are dropped
                   the relay sends no more visitors to this agent. A shared tunnel goes on with its other agents; any
                   other tunnel is drained at the relay, too, and its address stays reserved for its successor
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from tunneld.agent.events import Field, Reporter
from tunneld.agent.relay_connection import RelayConnection
from tunneld.agent.session import TunnelSession
from tunneld.agent.visitors import LocalVisitors
from tunneld.errors import TunneldError

CLOSE_WITHIN = 3.0
"""Seconds to tell the relay that no more visitors are wanted; the user has pressed Ctrl-C and waits."""
FINISH_WITHIN = 5.0
"""Seconds more for the last bytes of finished visitors to reach the relay."""


class AgentShutdown:
    """The end of one exposure. Every step takes bounded time, except `wait_for_visitors`."""

    def __init__(
        self,
        relay: RelayConnection,
        visitors: LocalVisitors,
        reporter: Reporter,
        on_withdrawn: Callable[[], None],
        *,
        shared: bool,
    ) -> None:
        """`on_withdrawn` is called once the relay sends no more visitors, or could not be told. `shared`: other agents
        may serve the tunnel as well.
        """
        self.reason = "told to stop"
        self.drain_timeout: float | None = None  # seconds for visitors to finish, once draining
        self._relay = relay
        self._visitors = visitors
        self._reporter = reporter
        self._on_withdrawn = on_withdrawn
        self._shared = shared
        self._relay_knows = False

    async def drain(self, session: TunnelSession | None) -> None:
        """Leave the tunnel, and wait for the present visitors."""
        if session is None:
            return
        session.source.pause()
        with trio.move_on_after(CLOSE_WITHIN), suppress(TunneldError):
            await self._leave(session, drop=False)
        self._on_withdrawn()
        if self._visitors.now:
            self._report("draining", session, visitors=self._visitors.now, delay=self.drain_timeout or 0.0)
        with trio.move_on_after(self.drain_timeout or 0.0) as scope:
            await self._visitors.wait_none()
        if not scope.cancelled_caught:
            with trio.move_on_after(FINISH_WITHIN):
                await session.source.wait_closed()

    async def wait_for_visitors(self, session: TunnelSession | None) -> None:
        """The relay refused this agent permanently: wait for present visitors as long as it lets them finish."""
        if session is not None and self._visitors.now:
            session.source.pause()
            self._report("draining", session, visitors=self._visitors.now)
            await self._visitors.wait_none()

    async def close(self, session: TunnelSession) -> None:
        """Drop the remaining visitors, close the tunnel at the relay, and report it. Finishes even if cancelled.

        The tunnel's address stays reserved. A shared tunnel stays open for its other agents.
        """
        session.source.pause()
        if not self._relay_knows:
            with trio.move_on_after(CLOSE_WITHIN, shield=True), suppress(TunneldError):
                await self._leave(session, drop=True)
        self._visitors.drop()
        session.source.close()
        visitors, (up, down) = self._visitors, self._visitors.bytes_moved
        counts = {"served": visitors.served, "failed": visitors.failed, "up": up, "down": down}
        self._report("closed", session, reason=self.reason, **counts)

    async def _leave(self, session: TunnelSession, *, drop: bool) -> None:
        """Have the relay send no more visitors. With `drop`, it drops the present ones of a tunnel that is not shared;
        else they finish. Without a control connection, wait for one.
        """
        self._relay.retry_now()
        client = await self._relay.client()
        if session.client is not client:
            await session.check(client)
        last = self._relay.leave(session.tunnel.id)
        if drop and not self._shared:
            await client.close(session.tunnel.id, keep=True)
        else:
            await session.leave(client, shared=self._shared, last=last)
        self._relay_knows = True
        if not drop:
            await session.settle(client)

    def _report(self, event: str, session: TunnelSession, **fields: Field) -> None:
        self._reporter.report(event, id=session.tunnel.id, **fields)
