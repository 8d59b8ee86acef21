"""Keeping one tunnel open at one relay: check it, refill and trim its connections, leave it.

The agent does not `watch` its tunnel: that would cost the relay and the agent an event for each step of each visitor,
and the agent's connections notice as fast. When the tunnel or the relay goes, the kernel ends every connection. That is
*trouble*, and after trouble the session checks the tunnel at once. Where the connections do not end (a cable is
unplugged), the request that is sent anyway every `REVIEW_INTERVAL` seconds finds out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.backoff import Backoff
from tunneld.agent.events import FAILURE_REPORTS, MAX_MESSAGES, Reporter
from tunneld.agent.handshake_pool import HandshakePool
from tunneld.agent.pool import REVIEW_INTERVAL, Pool
from tunneld.agent.relay_connection import RelayConnection
from tunneld.agent.request import OpenTunnel, TunnelRequest, open_tunnel
from tunneld.agent.source import ConnectionSource, SourceEvents, VisitorCallback
from tunneld.client import Client
from tunneld.client.client import Record
from tunneld.engine.engine import Engine, FailureCallback
from tunneld.errors import NoSuchTunnelError, RefusedError, TunneldError
from tunneld.net.dial import resolve_relay
from tunneld.net.endpoint import Endpoint
from tunneld.policy.rates import LogLimiter

if TYPE_CHECKING:
    from tunneld.agent.carriers import RelayCarriers

WEBMUX_SCHEMES = frozenset({"webmux", "webmuxs"})
"""Schemes of server URIs that carriers connect to."""
TRIM_INTERVAL = 0.1
"""Seconds before the relay is asked to trim again: for closed connections and visitors' headers to arrive here, and for
connections that were being dialled to arrive at the relay.
"""
SHORTAGE_INTERVAL = 1.0
"""Seconds until another attempt when this machine has no descriptor or port left, unless a visitor leaves before."""
HOLD, REST = 5.0, 300.0
"""Seconds for which an agent that polls holds its control connection when there is nothing to do, and does without one:
a tunnel that is closed meanwhile refuses the next poll.
"""
MAX_TRIMS = 10
"""Requests to trim. After a second and ten round trips, the remaining parked connections are dead."""


@dataclass(frozen=True, slots=True)
class AgentContext:
    """What all tunnels of an exposure share."""

    engine: Engine
    nursery: trio.Nursery
    relay: RelayAccess
    reporter: Reporter
    carriers: Callable[[], RelayCarriers] | None = None  # of all tunnels of the process at this relay


class TunnelSession:
    """One open tunnel and its source of connections. Methods get a control connection: after a loss, the next one."""

    source: ConnectionSource

    def __init__(self, tunnel: OpenTunnel, reporter: Reporter) -> None:
        """Made by `start`."""
        self.tunnel = tunnel
        self.client: Client | None = None  # the control connection by which the relay knows this agent
        self._reporter = reporter
        self._kept = False  # `keep` runs
        self._accepting = False  # visitors are wanted
        self._wake = trio.Event()  # there is something for `keep` to do
        self._trouble: str | None = None  # why connections were lost, until `keep` has acted on it
        self._shortage: str | None = None  # of descriptors or ports, the same
        self._freed = trio.Event()  # a visitor has left
        self._certificate_problem = ""
        self._backoff = Backoff()
        self._repeats = LogLimiter(FAILURE_REPORTS, MAX_MESSAGES)

    @classmethod
    async def start(
        cls,
        client: Client,
        context: AgentContext,
        request: TunnelRequest,
        *,
        on_visitor: VisitorCallback,
        on_failure: FailureCallback,
    ) -> TunnelSession:
        """Open a tunnel and a source of connections for it; visitors come after `resume`.

        `on_visitor` gets each visitor, `on_failure` a bug in a callback. Raises `RefusedError`,
        `RelayUnreachableError`, and as any call.
        """
        tunnel = await open_tunnel(client, request.open_options, request.backend)
        session = cls(tunnel, context.reporter)
        session.client = client
        events = SourceEvents(on_visitor, session._on_trouble, on_failure, session._on_shortage)
        try:
            session.source = await _new_source(tunnel.server, context, request, events)
        except TunneldError:
            await client.close(tunnel.id)
            raise
        return session

    def resume(self) -> None:
        """Take visitors, from now on or again."""
        self._accepting = True
        self.source.resume()

    def withdraw(self) -> None:
        """Take no more visitors for now, once the relay knows. Visitors that are connected or on their way go on."""
        self._accepting = False
        self.source.withdraw()
        self._wake.set()

    async def check(self, client: Client) -> None:
        """Raise `NoSuchTunnelError` unless the tunnel is open and takes visitors; `RefusedError` with the code `ended`
        or `expired` if it has ended for good; and as any call.
        """
        record: Record = {}
        with _ignoring_no_such_tunnel():
            record = (await client.show(str(self.tunnel.server)))[0]
        if not self.tunnel.matches(record):
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} was closed at the relay")
        if record.get("phase") == "draining":
            with _ignoring_no_such_tunnel():
                await client.get_tunnel_address(str(self.tunnel.server))  # refused, with the reason
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} is being drained at the relay")

    async def rejoin(self, client: Client) -> None:
        """Join the open tunnel again over a new control connection; visitors come after `resume`. Raises as `check`.

        The agent's address may have changed. Then the parked connections from the old address are dead, and neither end
        can tell, so they are all given up.
        """
        try:
            await client.call("join", self.tunnel.id)
        except RefusedError as error:
            if error.reply_code != NoSuchTunnelError.code:
                raise
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} was closed at the relay") from None
        self.client = client
        if self.source.size:
            self.withdraw()
            await self._trim_all(client)

    async def leave(self, client: Client, *, shared: bool, last: bool) -> None:
        """Serve this tunnel no more. The relay drains it, or leaves it to the other agents if it is `shared`.

        For the latter, the relay must be able to tell this agent's carriers from the other ones: so they are withdrawn
        first. It is told nothing unless this is the `last` exposure of this agent. Raises as any call.
        """
        self.withdraw()
        if shared:
            await self.source.wait_withdrawn()
        if last:
            await client.call("leave", self.tunnel.id)

    async def settle(self, client: Client) -> None:
        """Wait, after `leave`, until the visitors on their way have arrived. Raises as any call."""
        await self.source.wait_withdrawn()
        await self._trim_all(client)

    async def keep(self, client: Client, rest_after: float = math.inf) -> None:
        """Look after the tunnel until nothing has happened for `rest_after` seconds. The loss of the tunnel or of the
        connection is an exception, see `check`.
        """
        self._kept = True
        try:
            while True:
                with trio.move_on_after(min(REVIEW_INTERVAL, rest_after)):
                    await self._wake.wait()
                self._wake = trio.Event()
                if not self._accepting and self.source.parked:
                    await self._trim_all(client)
                elif self._trouble is not None:
                    await self._recover(client)
                elif self._shortage is not None:
                    await self._outlast_shortage()
                else:
                    self._backoff.reset()
                    await self._review(client)
                    if rest_after <= REVIEW_INTERVAL:
                        return
        finally:
            self._kept = False
            if self._trouble is not None:
                self.source.pause()

    async def wait_for_work(self, seconds: float) -> None:
        """Wait, between two calls of `keep`, until there is something for it to do, or for that long."""
        with trio.move_on_after(seconds):
            await self._wake.wait()

    def wake(self) -> None:
        """Have `keep` look after the tunnel now: the control connection was lost."""
        self._wake.set()

    def on_visitor_left(self) -> None:
        """A visitor has left, and with it two descriptors."""
        self._freed.set()

    def _on_shortage(self, reason: str) -> None:
        """Called by the source: this machine has no descriptor or port for another connection."""
        self._shortage = reason
        self._wake.set()

    def _on_trouble(self, reason: str) -> None:
        """Called by the source: connections were lost or could not be made. Without a control connection the relay is
        probably gone; when there is one again, `resume` is called.
        """
        self._trouble = reason
        self._wake.set()
        if not self._kept:
            self.source.pause()

    async def _review(self, client: Client) -> None:
        """Nothing happened for a while: check that the relay answers, and trim the pool if it is too large."""
        if self.source.resize():
            await client.call("trim", self.tunnel.id, str(self.source.size))
            return
        try:
            if self.tunnel.client.scheme == "https":
                self._report_certificate((await client.show(str(self.tunnel.server)))[0])
            else:
                await client.get_tunnel_address(str(self.tunnel.server))
        except RefusedError as error:
            if error.reply_code != NoSuchTunnelError.code:
                raise
            await self.check(client)

    def _report_certificate(self, record: Record) -> None:
        """Report why the relay has no certificate for the host name; once for each reason."""
        problem = record.get("certificate", "")
        if problem and problem != self._certificate_problem:
            self._reporter.report("uncertified", host=self.tunnel.client.host, reason=problem)
        self._certificate_problem = problem

    async def _trim_all(self, client: Client) -> None:
        """Have the relay close parked connections until none is left or visitors are wanted again.

        Only the relay knows which of them have no visitor: one closed from here may have a visitor already.
        """
        for _ in range(MAX_TRIMS):
            if self._accepting or not self.source.parked:
                return
            with _ignoring_no_such_tunnel():  # the next check says so
                await client.call("trim", self.tunnel.id, "0")
            with trio.move_on_after(TRIM_INTERVAL):
                await self.source.wait_closed()
        if not self._accepting:
            self.source.close()

    async def _recover(self, client: Client) -> None:
        """Connections were lost. If the tunnel is still open, dial again, ever more slowly while they do not last."""
        reason, self._trouble = self._trouble or "", None
        await self.check(client)
        self._report_trouble(reason)
        await trio.sleep(self._backoff.next_delay())
        if self._accepting:
            self.source.resume()

    async def _outlast_shortage(self) -> None:
        """Dial again as soon as this machine has a descriptor or port for it. The relay is not to blame for the
        shortage, so the delay does not grow.
        """
        reason, self._shortage = self._shortage or "", None
        self._report_trouble(reason)
        self._freed = trio.Event()
        with trio.move_on_after(SHORTAGE_INTERVAL):
            await self._freed.wait()
        if self._accepting:
            self.source.resume()

    def _report_trouble(self, reason: str) -> None:
        repeated = self._repeats.passes(trio.current_time(), reason)
        if repeated is not None:
            self._reporter.report("trouble", reason=reason, repeated=repeated)


async def keep_resting(session: TunnelSession, client: Client, relay: RelayConnection) -> None:
    """Look after the tunnel of an agent that polls, without holding a control connection for long. Raises as
    `TunnelSession.keep`.
    """
    while True:
        await session.keep(client, HOLD)
        relay.rest(client)
        await session.wait_for_work(REST)
        client = await relay.client()
        if client is not session.client:
            await session.check(client)
            await session.rejoin(client)


@contextmanager
def _ignoring_no_such_tunnel() -> Iterator[None]:
    """Leave the block if the relay says that there is no such tunnel; raise other refusals."""
    try:
        yield
    except RefusedError as error:
        if error.reply_code != NoSuchTunnelError.code:
            raise


async def _new_source(
    server: Endpoint, context: AgentContext, request: TunnelRequest, events: SourceEvents
) -> ConnectionSource:
    """Make the source of connections for a server URI. Raises `RelayUnreachableError`, `UsageError`."""
    engine, nursery, relay = context.engine, context.nursery, context.relay
    if server.scheme in WEBMUX_SCHEMES:
        from tunneld.agent.carriers import CarrierSource  # noqa: PLC0415  # on systems that have carriers

        assert context.carriers is not None
        return CarrierSource(context.carriers(), server, events, nursery, keep_header=request.keep_header)
    if server.scheme == "egtp":
        from tunneld.agent.associations import Associations  # noqa: PLC0415  # on systems that have carriers

        assert request.identity is not None
        kept, poll = request.keep_header, request.poll
        return Associations(engine, relay, server, request.identity, events, nursery, keep_header=kept, poll=poll)
    if server.key:
        return HandshakePool(engine, relay, server, request.limits, events, nursery, keep_header=request.keep_header)
    address = await resolve_relay(server.host, server.port)
    return Pool(engine, address, request.limits, events, keep_header=request.keep_header)
