"""The control connection to one relay, and its carriers. All exposures of a process that use the relay share them.

    run     connect ──► connected ──► lost, or dropped by an exposure ──► wait ─┐
               └────────────────────────────┴─ all exposures rest ──► asked for ┘

There is one login, one backoff and one connection, however many exposures there are: so hundreds of them do not fill
the relay's places for unauthenticated connections, and a rotated secret is one failed login. Exposures call `client`
for the open connection, and register what is to be called when it is lost. The connection ends with its last exposure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from tunneld.agent.access import SECRET_CHECK_INTERVAL, RelayAccess
from tunneld.agent.backoff import MIN_UPTIME, Backoff
from tunneld.agent.network import NetworkMonitor, is_local_address
from tunneld.client import Client
from tunneld.engine.engine import Engine
from tunneld.errors import (
    EndedError,
    ExpiredError,
    NotAllowedError,
    RefusedError,
    RelayUnreachableError,
    TunneldError,
    UsageError,
)

if TYPE_CHECKING:
    from tunneld.agent.carriers import RelayCarriers

PERMANENT_REFUSALS = frozenset({UsageError.code, NotAllowedError.code, EndedError.code, ExpiredError.code})
"""Codes of refusals that another attempt does not change."""
RESTART_WITHIN = 30.0
"""Seconds after a loss in which the relay is probably restarting. A connection that does not last counts as lost once:
after that, attempts become rarer.
"""
MAX_RESTART_DELAY = 2.0
"""Seconds between two attempts in that time: the agent is back soon after the relay."""

LostCallback = Callable[[str, float], None]
"""Gets the reason for which the connection was lost or could not be made, and the seconds until the next attempt."""


class RelayConnection:
    """Keeps a control connection to one relay open while exposures use it. The owner runs `run` in a task."""

    def __init__(self, access: RelayAccess, monitor: NetworkMonitor, *, patient: bool = False) -> None:
        """`monitor` ends delays early. `patient`: retry a first attempt that fails, like any later one."""
        self.access = access
        self.patient = patient
        self._monitor = monitor
        self._client: Client | None = None
        self._nursery: trio.Nursery  # of `run`
        self._carriers: RelayCarriers | None = None
        self._changed = trio.Event()  # connected, or failed permanently
        self._failure: TunneldError | None = None  # permanent
        self._reason: TunneldError | None = None  # why an exposure dropped the connection
        self._was_connected = False
        self._lost_at = -math.inf  # when a connection that had lasted was lost, or the first one
        self._exposures: list[LostCallback] = []
        self._serving: Counter[str] = Counter()  # exposures that serve a tunnel, by its id
        self._resting = 0  # exposures that need the present connection no more
        self._rests = False  # there is none, because none is needed
        self._wanted = trio.Event()  # one is, again
        self._delay = trio.CancelScope()  # around the delay before the next attempt
        self._scope = trio.CancelScope(shield=True)  # exposures that are cancelled still close their tunnels

    @property
    def in_use(self) -> bool:
        """Whether exposures can still be added: neither has it failed, nor has its last exposure ended."""
        return self._failure is None and not self._scope.cancel_called

    @contextmanager
    def attached(self, on_lost: LostCallback) -> Iterator[None]:
        """Use the connection for the length of the block, and have `on_lost` called whenever there is none."""
        self._exposures.append(on_lost)
        try:
            yield
        finally:
            self._exposures.remove(on_lost)
            if not self._exposures:
                self._scope.cancel()

    async def client(self) -> Client:
        """Wait for the open connection. Raises the reason for which no further attempt is made."""
        self._wanted.set()
        while self._client is None:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            await self._changed.wait()
        return self._client

    def drop(self, client: Client, error: TunneldError) -> None:
        """A call over this connection failed in a way that only a new connection can mend. Harmless when repeated."""
        if client is self._client:
            self._client, self._reason = None, error
            client.give_up(str(error))

    def rest(self, client: Client) -> None:
        """An exposure does not need the connection for now. It is closed once no exposure does, until one asks for
        `client`; that is no loss.
        """
        if client is not self._client:
            return
        self._resting += 1
        if self._resting >= len(self._exposures):
            self._client, self._rests, self._wanted = None, True, trio.Event()
            client.give_up("it is not needed now")

    def retry_now(self) -> None:
        """End the delay before the next attempt, if there is one."""
        self._delay.cancel()

    def carriers(self, engine: Engine) -> RelayCarriers:
        """The carriers of all tunnels of this process at the relay, moved by this engine. `client` has returned."""
        if self._carriers is None:
            from tunneld.agent.carriers import RelayCarriers  # noqa: PLC0415  # on systems that have carriers

            self._carriers = RelayCarriers(engine, self.access, self._nursery)
        return self._carriers

    # Tunnels that several exposures of this process share: to the relay they are one agent

    def serve(self, tunnel: str) -> None:
        """One more exposure serves the tunnel with this id."""
        self._serving[tunnel] += 1

    def leave(self, tunnel: str) -> bool:
        """One exposure less serves it; returns whether that was the last one."""
        self._serving[tunnel] -= 1
        if self._serving[tunnel] > 0:
            return False
        del self._serving[tunnel]
        return True

    # The task

    async def run(self) -> None:
        """Connect, and reconnect after each loss, until the last exposure has ended or an attempt fails permanently.
        Cancellation alone does not end it: exposures that are cancelled close their tunnels first.
        """
        with self._scope, self._monitor.calling(self._on_network_change):
            async with trio.open_nursery() as self._nursery:  # in which carriers outlive a failure, with their visitors
                await self._stay_connected()

    async def _stay_connected(self) -> None:
        quick, backoff = Backoff(longest=MAX_RESTART_DELAY), Backoff()
        while self._failure is None:
            credential = self.access.credential
            error, uptime = await self._connect_once()
            if self._rests:
                self._rests = False
                await self._wanted.wait()
                continue
            if uptime:
                credential = None
            if uptime >= MIN_UPTIME or (uptime and math.isinf(self._lost_at)):
                self._lost_at = trio.current_time()
                quick.reset()
            if credential and self._may_get_new_secret(error):
                self._report(f"{error}; waiting for a new secret in its file", SECRET_CHECK_INTERVAL)
                await self.access.wait_for_new_secret(credential)
            elif self._is_permanent(error) and not uptime:
                self._failure = error
                self._notify_changed()
            else:
                restarting = trio.current_time() - self._lost_at < RESTART_WITHIN
                await self._wait(error, uptime, quick if restarting else backoff)

    async def _connect_once(self) -> tuple[TunneldError, float]:
        """Connect once, and keep the connection until it is lost; returns the reason and its age in seconds."""
        connected_at, error = None, TunneldError()
        try:
            async with self.access.connect() as client:
                connected_at = trio.current_time()
                self.access.shares_port, self.access.shares_carriers = client.shares_port, client.shares_carriers
                self._client, self._reason, self._was_connected, self._resting = client, None, True, 0
                self._notify_changed()
                lost = await client.wait_lost()
            error = self._reason or RelayUnreachableError(lost)
        except TunneldError as failure:
            error = failure
        finally:
            self._client = None
        return error, 0.0 if connected_at is None else max(trio.current_time() - connected_at, 1e-9)

    async def _wait(self, error: TunneldError, uptime: float, backoff: Backoff) -> None:
        """Wait before the next attempt. A change of the network or a suspend ends it, and makes delays short again."""
        delay = backoff.delay_after(uptime)
        self._report(str(error), delay)
        with trio.CancelScope() as self._delay:
            if await self._monitor.sleep(delay):
                backoff.reset()

    def _report(self, reason: str, delay: float) -> None:
        for on_lost in list(self._exposures):
            on_lost(reason, delay)

    def _notify_changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _is_permanent(self, error: TunneldError) -> bool:
        code = error.reply_code if isinstance(error, RefusedError) else error.code
        return code in PERMANENT_REFUSALS or not (self._was_connected or self.patient)

    def _may_get_new_secret(self, error: TunneldError) -> bool:
        """Whether the relay refused a secret that comes from a file: it was rotated, and the file may follow."""
        refused = isinstance(error, RefusedError) and error.reply_code == NotAllowedError.code
        return refused and self.access.reread_secret is not None and (self._was_connected or self.patient)

    def _on_network_change(self) -> None:
        """Give up a connection whose local address this machine lost: such a connection ends silently."""
        client = self._client
        if client is not None and client.local_host and not is_local_address((client.local_host, 0)):
            self._client = None
            client.give_up(f"this machine no longer has the address {client.local_host}")
