"""What an agent asks of the relay: open a tunnel, look after it, trim its pool, close it.

The agent does not `watch` its tunnel: that costs the relay and the agent an event for each step of each visitor, and
the pool knows as fast. When the tunnel or the relay goes, the kernel ends every parked connection; that is *trouble*,
and trouble makes the keeper ask at once. Where nobody is left to end connections (a cable is pulled), the question that
is asked anyway every `REVIEW` seconds finds out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import trio

from tunneld.agent.backoff import delays
from tunneld.agent.dial import resolve_relay
from tunneld.agent.events import Teller
from tunneld.agent.pool import Owner, Pool, Take
from tunneld.agent.repeats import Repeats
from tunneld.agent.sizing import REVIEW, Limits
from tunneld.client import Client
from tunneld.endpoint import Endpoint
from tunneld.errors import NoSuchTunnelError, RefusedError, RemoteProtocolError, TunneldError
from tunneld.relay.engine import Engine, Failure
from tunneld.wire.lines import Value

OUR_OPTIONS: Mapping[str, Value] = {"persist": True, "proxy_protocol": "v2"}
"""The pool needs a tunnel that outlives its relays, and the header that tells it of each visitor."""
SLACK = 5.0
"""Seconds by which a tunnel's age, told in whole seconds over a slow line, may differ from ours."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What kind of tunnel is wanted."""

    options: Mapping[str, Value] = field(default_factory=dict)  # of openTunnel; `OUR_OPTIONS` come on top
    limits: Limits = field(default_factory=Limits)
    keep_header: bool = False  # leave the PROXY header in front of what the visitor says


@dataclass(frozen=True, slots=True)
class OpenTunnel:
    """A tunnel of ours at the relay."""

    id: str
    server: Endpoint  # where our parked connections go
    client: Endpoint  # where clients connect
    opened_at: float  # in `trio.current_time`

    @property
    def age(self) -> float:
        """Seconds since it was opened."""
        return trio.current_time() - self.opened_at

    def is_described_by(self, record: Mapping[str, str]) -> bool:
        """Whether `record` is this tunnel, and not one that a restarted relay has opened on the same port since."""
        same = record.get("id") == self.id and record.get("client") == str(self.client)
        return same and int(record.get("age", "0")) + SLACK >= self.age


async def open_tunnel(client: Client, options: Mapping[str, Value]) -> OpenTunnel:
    """Open a tunnel for a pool. Raises `RefusedError` and what else a call raises."""
    uri = await client.open_tunnel("tcp", **{**options, **OUR_OPTIONS})
    record = (await client.show(uri))[0]
    try:
        return OpenTunnel(record["id"], Endpoint.parse(uri), Endpoint.parse(record["client"]), trio.current_time())
    except (KeyError, TunneldError) as error:
        raise RemoteProtocolError(f"relay {client.relay} describes tunnel {uri} oddly: {error}") from None


class Keeper:
    """One open tunnel and its pool, looked after over a control connection (or, after a loss, over the next one)."""

    def __init__(self, tunnel: OpenTunnel, pool: Pool, teller: Teller, trouble: Trouble) -> None:
        """Made by `start`."""
        self.tunnel = tunnel
        self.pool = pool
        self._teller = teller
        self._trouble = trouble
        self._waits: Iterator[float] = delays(random.random)
        self._repeats = Repeats()

    @classmethod
    async def start(
        cls, client: Client, engine: Engine, wish: Wish, teller: Teller, *, take: Take, failed: Failure
    ) -> Keeper:
        """Open a tunnel and fill its pool. Raises `RefusedError`, `RelayUnreachableError`, ... as any call."""
        tunnel = await open_tunnel(client, wish.options)
        try:
            address = await resolve_relay(tunnel.server.host, tunnel.server.port)
        except TunneldError:
            await client.close(tunnel.id)
            raise
        trouble = Trouble()
        owner = Owner(take, trouble.report, failed)
        pool = Pool(engine, address, wish.limits, owner, keep_header=wish.keep_header)
        pool.resume()
        return cls(tunnel, pool, teller, trouble)

    async def check(self, client: Client) -> None:
        """Raise `NoSuchTunnelError` unless the tunnel is open and takes visitors; and what else a call raises."""
        record: Mapping[str, str] = {}
        try:
            record = (await client.show(str(self.tunnel.server)))[0]
        except RefusedError as error:
            if error.reply_code != NoSuchTunnelError.code:
                raise
        if not self.tunnel.is_described_by(record):
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} was closed at the relay")
        if record.get("phase") == "draining":
            raise NoSuchTunnelError(f"tunnel {self.tunnel.id} is being drained at the relay")

    async def keep(self, client: Client) -> None:
        """Look after the tunnel until it is gone, which an exception says: see `check`."""
        while True:
            with trio.move_on_after(REVIEW):
                await self._trouble.happened.wait()
            if self._trouble.happened.is_set():
                await self._mend(client)
            else:
                self._waits = delays(random.random)
                await self._review(client)

    async def _review(self, client: Client) -> None:
        """Nothing happened for a while: is the relay there, and is the pool larger than it needs to be?"""
        if self.pool.review():
            await client.call("trim", self.tunnel.id, str(self.pool.size))
        else:
            await client.get_tunnel_address(str(self.tunnel.server))

    async def _mend(self, client: Client) -> None:
        """Parked connections ended: if the tunnel stands, dial again, ever more slowly while they do not last."""
        reason = self._trouble.take()
        await self.check(client)
        repeated = self._repeats.admit(reason, trio.current_time())
        if repeated is not None:
            what = f"parked connections to {self.tunnel.server}: {reason}"
            self._teller.tell("trouble", reason=what, repeated=repeated)
        await trio.sleep(next(self._waits))
        self.pool.resume()


class Trouble:
    """What the pool reports to its keeper, across from the engine's task."""

    def __init__(self) -> None:
        self.happened = trio.Event()
        self._reason = ""

    def report(self, reason: str) -> None:
        """Called by the pool."""
        self._reason = reason
        self.happened.set()

    def take(self) -> str:
        """The reason, and ready for the next one."""
        self.happened = trio.Event()
        return self._reason
