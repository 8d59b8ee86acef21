"""Make a local server reachable: open a tunnel, serve its visitors, and after a loss come back.

    expose
    ├─ visitors                  without a task, see visitors.py; they outlive tunnels: whoever is being served when
    │                            the relay's daemon drains may finish
    ├─ patient visitor ×N        only those for whom the local server cannot be dialled the short way
    ├─ carriers ×N               of the tunnel that is open, and of former ones whose visitors finish: see carriers.py
    ├─ watch                     where the local server is to be checked: see health.py
    └─ (this task)               connect ──► open, or find the tunnel still there ──► keep ──► lost ──► wait ─┐
                                    └────────────────────────────────────────────────────────────────────────┘

The engine is not part of it and may serve other exposures, too: what this one has there, it takes along when it ends.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from tunneld.agent.access import SECRET_CHECK_INTERVAL, RelayAccess
from tunneld.agent.backoff import Backoff
from tunneld.agent.config import ExposureConfig
from tunneld.agent.events import Reporter, Stats
from tunneld.agent.health import Check, UnhealthyPolicy, watch
from tunneld.agent.local import LocalServer, complaint
from tunneld.agent.network import NetworkMonitor, is_ours
from tunneld.agent.request import TunnelRequest
from tunneld.agent.session import AgentContext, TunnelSession
from tunneld.agent.shutdown import AgentShutdown
from tunneld.agent.visitors import LocalVisitors
from tunneld.client import Client
from tunneld.engine.engine import Engine
from tunneld.errors import (
    EndedError,
    LimitReachedError,
    ListenError,
    NoSuchTunnelError,
    NotAllowedError,
    RefusedError,
    RelayUnreachableError,
    TunneldError,
    UsageError,
)

FOR_GOOD = frozenset({UsageError.code, NotAllowedError.code, EndedError.code})
"""Refusals that trying again does not mend."""
PORT_TAKEN = frozenset({LimitReachedError.code, ListenError.code, UsageError.code})
"""How a relay refuses a port that somebody else has, or that a reload took out of its range."""

CLOCKS_DIFFER = 1.0
"""Seconds before our end of the `ttl` at which the relay's may come."""

Start = Callable[[Client, TunnelRequest], Awaitable[TunnelSession]]
"""Opens a tunnel of this kind whose visitors are served."""


@asynccontextmanager
async def open_exposure(
    plan: ExposureConfig,
    relay: RelayAccess,
    teller: Reporter,
    engine: Engine,
    wake: NetworkMonitor,
    *,
    patient: bool = False,
    on_left: Callable[[], None] = lambda: None,
) -> AsyncIterator[Exposure]:
    """Everything that `Exposure.run` needs, for the length of the block. At its end the tunnel is closed and whoever is
    still here is cut.

    `engine` moves the bytes, `wake` ends waits early; somebody else runs both. `patient`: a first attempt that fails is
    tried again like any other. `on_left` is called once the relay sends us nobody any more, while those who are here
    finish.
    """
    async with trio.open_nursery() as nursery:
        http = plan.scheme == "http"
        visitors = LocalVisitors(LocalServer(plan.target), nursery, teller, linger=plan.linger, http=http)

        async def start(client: Client, wish: TunnelRequest) -> TunnelSession:
            ground = AgentContext(engine, nursery, relay, teller, exposure.hurry)
            return await TunnelSession.start(client, ground, wish, take=visitors.take, failed=exposure.fail)

        ending = AgentShutdown(relay, visitors, teller, on_left, shared=bool(plan.request.options.get("share")))
        exposure = Exposure(relay, plan.request, teller, visitors, start, ending, wake=wake, patient=patient)
        if (check := plan.check) is not None:
            nursery.start_soon(watch, LocalServer(plan.target), check, teller, partial(exposure.heed, check))
        if (nothing_there := complaint(plan.target)) is not None:
            teller.report("trouble", reason=nothing_there, repeated=0)
        try:
            yield exposure
        finally:
            await exposure.close()
            nursery.cancel_scope.cancel()


class Exposure:
    """A local server that is reachable through a relay."""

    def __init__(
        self,
        relay: RelayAccess,
        wish: TunnelRequest,
        teller: Reporter,
        visitors: LocalVisitors,
        start: Start,
        ending: AgentShutdown,
        *,
        wake: NetworkMonitor,
        patient: bool,
    ) -> None:
        """Made by `open_exposure`."""
        self._relay = relay
        self._wish = wish
        self._teller = teller
        self._visitors = visitors
        self._start = start
        self._wake = wake
        self._patient = patient
        self._ending = ending
        self._withdrawn = False  # nothing is to be parked at the relay
        self._connected_at: float | None = None  # in `trio.current_time`
        self._keeper: TunnelSession | None = None  # of the tunnel that is open, or was when we last knew
        self._ends_at: float | None = None  # when the first tunnel's ttl is over, in `trio.current_time`
        self._was_open = False
        self._bug: Exception | None = None
        self._scope = trio.CancelScope()
        self._at_work = trio.CancelScope()  # until told to drain
        self._line = trio.CancelScope()  # of what is asked over the control connection
        self._local_host = ""  # our address of it

    @property
    def figures(self) -> Stats:
        """How it is doing."""
        up, down = self._visitors.octets
        parked = self._keeper.supply.parked if self._keeper else 0
        return Stats(self._visitors.now, self._visitors.served, self._visitors.failed, parked, up, down)

    async def run(self) -> None:
        """Be reachable until the tunnel's `ttl` is over.

        Raises what the first attempt failed with, and afterwards only `RefusedError` where it is for good: whatever
        else goes wrong is told, waited out and tried again.
        """
        with self._scope:
            with self._at_work, self._wake.telling(self._doubt):
                await self._come_back_for_ever()
            if self._ending.patience is not None:
                await self._ending.drain(self._keeper)
        if self._bug:
            raise self._bug

    def heed(self, check: Check, healthy: bool) -> None:
        """Act on what the local server counts as. May be told the same again."""
        if check.conduct is UnhealthyPolicy.TELL or self._ending.patience is not None:
            return
        if (
            check.conduct is UnhealthyPolicy.WITHDRAW
        ):  # whoever is on the way to us has no other, and is served all the same
            if self._keeper is not None and healthy is self._withdrawn:
                (self._keeper.resume if healthy else self._keeper.withdraw)()
            self._withdrawn = not healthy
        elif healthy:
            self._visitors.serve()
        else:
            self._visitors.turn_away("the local server is unhealthy", answering=check.how == "http")

    def stop(self, reason: str) -> None:
        """End `run`, for a reason that is told."""
        self._ending.reason = reason
        self._scope.cancel()

    def drain(self, reason: str, seconds: float) -> None:
        """End `run` when those who are being served have finished, after so many `seconds` at the latest; nobody new is
        served. Harmless when repeated.
        """
        if self._ending.patience is None:
            self._ending.reason, self._ending.patience = reason, seconds
            self._at_work.cancel()

    def fail(self, error: Exception) -> None:
        """A bug in a callback: the exposure dies of it."""
        self._bug = self._bug or error
        self._scope.cancel()

    async def close(self) -> None:
        """Close the tunnel at the relay, in bounded time, and tell. Not stopped by being cancelled."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await self._ending.close(keeper)

    def hurry(self) -> None:
        """The relay answers again: the wait for it is over."""
        self._wake.wake()

    def _doubt(self) -> None:
        """The network changed: a connection from an address that is ours no more says so by silence only."""
        if self._local_host and not is_ours((self._local_host, 0)):
            self._line.cancel()
        if self._keeper is not None:
            self._keeper.supply.probe()

    async def _come_back_for_ever(self) -> None:
        backoff = Backoff(random.random)
        while True:
            self._connected_at, credential = None, self._relay.credential
            try:
                async with self._relay.connect() as client:
                    credential = None  # that was right
                    keeper = await self._find_or_open(client)
                    if not self._withdrawn:
                        keeper.resume()
                    self._connected_at = trio.current_time()
                    await self._keep(client, keeper)
            except TunneldError as error:
                if self._is_over(error):
                    return
                if credential and self._may_have_another_secret(error):
                    self._teller.report(
                        "reconnecting",
                        reason=f"{error}; waiting for another one in its file",
                        delay=SECRET_CHECK_INTERVAL,
                    )
                    await self._relay.wait_for_another_secret(credential)
                    continue
                if self._is_for_good(error):
                    self._ending.reason = str(error)
                    await self._ending.outlast(self._keeper)
                    raise
                connected_at = self._connected_at
                delay = backoff.after(0.0 if connected_at is None else trio.current_time() - connected_at)
                self._teller.report("reconnecting", reason=str(error), delay=round(delay, 1))
                if await self._wake.sleep(delay):
                    backoff.forget()

    async def _keep(self, client: Client, keeper: TunnelSession) -> None:
        """Look after the tunnel until it or the connection is lost, which an exception says."""
        self._local_host = client.local_host
        try:
            with trio.CancelScope() as self._line:
                await keeper.keep(client)
        except* trio.Cancelled:  # of each task that was in there
            await self._ending.begin(client, keeper)
            raise
        finally:
            self._local_host = ""
        raise RelayUnreachableError(f"control connection to relay {client.relay} is from an address that is gone")

    def _is_over(self, error: TunneldError) -> bool:
        """Whether the tunnel is gone because its time was over, which the person asked for, and not by a mishap."""
        soon, options = trio.current_time() + CLOCKS_DIFFER, self._wish.options
        if self._ends_at is not None and soon >= self._ends_at:
            self._ending.reason = f"lifetime of {options['ttl']} s is over (ttl)"
            return True
        idle = options.get("idle_timeout")
        if idle is None or not isinstance(error, NoSuchTunnelError) or soon < self._visitors.stirred_at + float(idle):
            return False
        self._ending.reason = f"no data for {idle} s (idle_timeout)"
        return True

    def _is_for_good(self, error: TunneldError) -> bool:
        code = error.reply_code if isinstance(error, RefusedError) else error.code
        if code == NotAllowedError.code and self._connected_at is not None:
            return False  # our credential changed under us: the next login hears what that means
        return code in FOR_GOOD or not (self._was_open or self._patient)

    def _may_have_another_secret(self, error: TunneldError) -> bool:
        """Whether the relay refused a secret that comes from a file: it was rotated, and the file follows."""
        refused = isinstance(error, RefusedError) and error.reply_code == NotAllowedError.code
        return refused and self._relay.reread is not None and (self._was_open or self._patient)

    async def _find_or_open(self, client: Client) -> TunnelSession:
        """The tunnel that only our control connection lost, or a new one."""
        keeper = self._keeper
        if keeper is not None:
            try:
                await keeper.check(client)
                await keeper.come_back(client)
            except NoSuchTunnelError:
                keeper.supply.close()
            else:
                self._teller.report("resumed", address=str(keeper.tunnel.client), id=keeper.tunnel.id)
                return keeper
        self._keeper = keeper = await self._open(client, keeper)
        self._was_open = True
        tunnel = keeper.tunnel
        self._teller.report("opened", address=str(tunnel.client), uri=str(tunnel.server), id=tunnel.id)
        return keeper

    async def _open(self, client: Client, former: TunnelSession | None) -> TunnelSession:
        """Open a tunnel, after a loss at the former address where it is free: visitors know that one."""
        wish = self._wish
        if former is None:
            keeper = await self._start(client, wish)
            ttl = wish.options.get("ttl")
            self._ends_at = None if ttl is None else trio.current_time() + float(ttl)
            return keeper
        if wish.options.get("name"):  # that another agent may have taken over since: it would be taken back, and so on
            wish = replace(wish, options={**wish.options, "replace": False})
        if self._ends_at is not None:
            wish = replace(wish, options={**wish.options, "ttl": round(self._ends_at - trio.current_time(), 3)})
        try:
            return await self._start(
                client, replace(wish, options={**wish.options, "client_port": former.tunnel.client.port})
            )
        except RefusedError as error:
            if error.reply_code not in PORT_TAKEN or "client_port" in wish.options:
                raise
        return await self._start(client, wish)
