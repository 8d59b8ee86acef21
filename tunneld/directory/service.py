"""The two calls, and what an operator does to the tunnels they made.

    tunnels                    isolation boundary: an exception closes its tunnel and is logged once
    └─ tunnel ×N               see tunnel/tunnel.py

Which tunnels there are, and what is asked of them, is in registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import trio

from tunneld.config.schema import Settings
from tunneld.directory.registry import TunnelRegistry, check_agrees
from tunneld.directory.reservations import Reservations, reservation_key
from tunneld.engine.engine import Engine
from tunneld.errors import DrainingError, LimitReachedError, ListenError, TunneldError, UsageError
from tunneld.net.endpoint import is_wildcard
from tunneld.policy.access import EVERYBODY, Grant, bound_hidden, permit
from tunneld.policy.options import TunnelOptions
from tunneld.policy.reservations import Reservation, ReservationKey
from tunneld.tunnel.events import Events
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.server_side import Backend, BackendServices, Handshakes
from tunneld.tunnel.snapshot import ServiceSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.tunnel import STOPPED, Phase, Tunnel

log = structlog.get_logger("service")


AtEnd = Callable[[str, Callable[[], None]], None]
"""Takes what to call at the end of something, and a word for it: of two with the same word only the later is called."""


def at_once(_word: str, call: Callable[[], None]) -> None:
    """Of what has no end that could be told: a request over HTTP."""
    call()


NEW_TUNNEL_GRACE = 10.0
"""Seconds that the hidden servers of a new tunnel have to connect before it counts as one that nobody serves: who has
just taken a name over keeps it, however slow its way.
"""


@dataclass(frozen=True, slots=True)
class Requester:
    """Who asks for a tunnel."""

    host: str  # the address it asks from
    owner: str  # the same for people, as `list` shows it
    local_host: str  # the address of ours that it reached: advertised where nothing better is configured
    grant: Grant = EVERYBODY  # what it may do, and to whom the tunnel will belong
    at_end: AtEnd = at_once  # who is told when its control connection ends


class TunnelService(TunnelRegistry):
    """All open tunnels of this process."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        engine: Engine,
        backends: Mapping[str, Backend],
        endpoints: KeyRegistry | None = None,
        state: Path | None = None,
        lobby: Handshakes | None = None,
    ) -> None:
        """`settings` is asked at every call, so that a reload reaches the next tunnel; `backends` are those that
        openTunnel takes, by name; `endpoints` are the shared
        ports of carriers, `state` the folder where reservations are kept, None for in memory only; `lobby` is where
        hidden servers show their keys.
        """
        super().__init__()
        self.events = Events()
        self.reservations = Reservations(settings, state)
        self.draining = False
        self.leaving = False
        self._settings = settings
        self._engine = engine
        self.keys = endpoints if endpoints is not None else KeyRegistry()
        self._premises = BackendServices(backends, self.keys, lobby)
        self._given_up: set[str] = set()  # the ids of tunnels whose address shall not be kept
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tunnels until cancelled, which drops them all."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.reservations.run)
            task_status.started()
            await trio.sleep_forever()

    # The two calls

    async def open_tunnel(self, backend: str, options: TunnelOptions, asker: Requester) -> Tunnel:
        """Open a tunnel; it listens on both sides when this returns. One of the same name and owner gives way to it,
        and the address that was its own is its own again, unless another is asked for.

        Raises `DrainingError`, `LimitReachedError`, `ListenError`, `NotAllowedError`, `ShortageError` or `UsageError`;
        nothing is left behind then.
        """
        settings, grant, backend = self._settings().tunnels, asker.grant, backend.lower()
        if self.draining:
            raise DrainingError("could not open a tunnel: the relay is being drained and takes nothing new")
        if self.leaving:
            raise DrainingError("could not open a tunnel: the relay starts again; try again in a moment")
        self._premises.backend(backend).check(self._premises, options)
        holder = reservation_key(options.name, grant.name, asker.host)
        if not options.replace:
            self._check_unserved(holder)
        opened = self._opened_by(grant.name) - self._giving_way(holder)
        options, asked = permit(grant, backend, options, asker.host, opened), options
        if (shared := self._shared(holder, options)) is not None:
            check_agrees(shared, backend, options, asked)
            self._join(shared, options, asker)
            return shared
        before = self.reservations.recall(holder, options.client_port, grant)  # before anybody gives way for nothing
        await self._evict(holder)
        address = self.reservations.recall(holder, options.client_port, grant) or before
        if len(self._tunnels) >= settings.max_tunnels:
            raise LimitReachedError(f"could not open a tunnel: {settings.max_tunnels} are open (tunnels.max_tunnels)")
        if grant.max_visitors is not None and grant.max_visitors < settings.max_visitors:
            settings = settings.model_copy(update={"max_visitors": grant.max_visitors})
        opening = TunnelSpec(
            id=f"t{self._last_id + 1}",
            backend=backend,
            options=options,
            settings=settings,
            owner=asker.owner,
            requester_host=asker.host,
            advertised_host=settings.advertised_host or self._reachable(settings.host, asker),
            services=self._premises,
            former_uri=address.server if address is not None else None,
            reserved=self.reservations.table,
            asked_from=asked.server_from,
        )
        tunnel = self._make(opening, address)
        self._last_id += 1
        self._enter(tunnel, grant.name)  # before we wait, or two could squeeze through a limit at once
        self.reservations.hold(holder, tunnel)
        self.opened += 1
        self._announce(tunnel)
        if options.share:
            self._join(tunnel, options, asker)
        await self._nursery.start(self._run, tunnel)
        await self.reservations.saved()
        return tunnel

    def join(self, reference: str, asker: Requester) -> Tunnel:
        """An agent whose control connection was lost is back, perhaps at another address: its hidden servers may come
        from there. Raises `NoSuchTunnelError`, `NotAllowedError`.
        """
        tunnel = self.find(reference, asker.grant)
        opening = tunnel.spec
        options = bound_hidden(asker.grant, replace(opening.options, server_from=opening.asked_from), asker.host)
        if options.share:
            self._join(tunnel, options, asker)
        else:
            tunnel.agents.move(opening.allowed_sources_for(options.server_from, asker.host))
        return tunnel

    def _join(self, tunnel: Tunnel, options: TunnelOptions, asker: Requester) -> None:
        """Whoever asks serves this tunnel, too, until its control connection ends or it leaves."""
        tunnel.agents.join(asker.owner, asker.host, tunnel.spec.allowed_sources_for(options.server_from, asker.host))
        asker.at_end(tunnel.id, lambda: tunnel.agents.leave(asker.owner))

    def _make(self, opening: TunnelSpec, address: Reservation | None) -> Tunnel:
        """The tunnel, at its own address if it has one. Another program may have taken the port meanwhile, or a reload
        have moved the range: then the tunnel is elsewhere rather than nowhere.
        """
        options = opening.options
        if address is not None and options.client_port is None:
            there = replace(opening, options=replace(options, client_port=address.client_port))
            try:
                return Tunnel(there, self._engine, self.events)
            except (LimitReachedError, ListenError, UsageError) as error:
                tunnel = Tunnel(opening, self._engine, self.events)
                log.warning(
                    "tunnel has another address than before", tunnel=opening.id, was=address.client_port,
                    now=tunnel.client_uri.port, reason=str(error),
                )  # fmt: skip
                return tunnel
        return Tunnel(opening, self._engine, self.events)

    # What an operator asks

    def named(self, name: str, asker: Requester) -> Tunnel | None:
        """The open tunnel of this name that is the asker's own."""
        return self._former(reservation_key(name, asker.grant.name, asker.host))

    async def close(self, reference: str, grant: Grant = EVERYBODY, *, keep: bool = False) -> Tunnel:
        """Stop one tunnel now; it is gone when this returns, and its address is anybody's unless it is to be kept.
        Raises `NoSuchTunnelError`.
        """
        tunnel = self.find(reference, grant)
        if not keep:
            self._given_up.add(tunnel.id)
        tunnel.close(self._end_on_purpose(tunnel, "closed", grant, again=keep))
        await tunnel.wait_closed()
        await self.reservations.saved()
        return tunnel

    def drain_one(self, reference: str, grant: Grant = EVERYBODY) -> Tunnel:
        """One tunnel takes nobody new, and closes when its last visitor has left. Raises `NoSuchTunnelError`."""
        tunnel = self.find(reference, grant)
        tunnel.drain(self._end_on_purpose(tunnel, "drained", grant))
        return tunnel

    async def drain(self) -> None:
        """Take nothing new and wait until the last relay has finished."""
        self.draining = True
        for tunnel in self.tunnels():
            tunnel.drain()
        for tunnel in self.tunnels():
            await tunnel.wait_closed()

    def drain_revoked(self, credentials: Collection[str]) -> None:
        """Drain the tunnels of credentials that are no more among these names, and give their addresses up."""
        for tunnel in self.tunnels():
            owner = self._owners[tunnel.id]
            if owner and owner not in credentials:
                log.info("tunnel's credential was removed", tunnel=tunnel.id, credential=owner)
                tunnel.drain()
        self.reservations.retain(credentials)

    # From one process to the next

    async def export(self) -> ServiceSnapshot:
        """Let go of all tunnels, for a successor: nothing of what goes along is closed, the rest is ended in order.
        No tunnel can be opened any more.
        """
        self.leaving = True
        await self.reservations.saved()
        for tunnel in self.tunnels():
            tunnel.pause()
        for _ in range(2):  # whoever was just given a server connection is paired with it
            await trio.lowlevel.checkpoint()
        legacies = []
        for tunnel in self.tunnels():
            try:
                legacies.append((self._owners[tunnel.id], tunnel.export()))
            except Exception as error:
                tunnel.fail(error)
        return ServiceSnapshot(self._past, legacies)

    async def adopt(self, legacy: ServiceSnapshot) -> None:
        """Go on with what another process left. A tunnel that cannot be is closed, and said."""
        self._resume(legacy.counters)
        for owner, one in legacy.tunnels:
            opening = replace(one.spec, services=self._premises, reserved=self.reservations.table)
            try:
                self._premises.backend(opening.backend).check(self._premises, opening.options)
                tunnel = Tunnel(opening, self._engine, self.events, one)
            except TunneldError as error:
                one.close()
                log.warning("tunnel could not be taken over", tunnel=opening.id, reason=str(error))
                continue
            self._enter(tunnel, owner)
            self.reservations.hold(reservation_key(opening.options.name, owner, opening.requester_host), tunnel)
            await self._nursery.start(self._run, tunnel)
        await self.reservations.saved()

    # Inside

    def _former(self, holder: ReservationKey | None) -> Tunnel | None:
        """The tunnel that this holder has open, of an agent that starts again before the relay knows it was gone."""
        for tunnel in self._tunnels.values() if holder is not None else ():
            if self.reservations.has(tunnel.id, holder) and tunnel.phase is not Phase.DRAINING:
                return tunnel
        return None

    def _shared(self, holder: ReservationKey | None, options: TunnelOptions) -> Tunnel | None:
        """The tunnel that is open and to be joined. Raises `UsageError` where there can be none."""
        if not options.share:
            return None
        if holder is None or not options.persist:
            raise UsageError("option share=yes goes with a name and with persist=yes")
        former = self._former(holder)
        return former if former is not None and former.spec.options.share else None

    def _check_unserved(self, holder: ReservationKey | None) -> None:
        """Raise `LimitReachedError` where hidden servers serve what this holder has open."""
        former = self._former(holder)
        if former is not None and (former.phase is Phase.READY or former.age < NEW_TUNNEL_GRACE):
            raise LimitReachedError(
                f"could not open a tunnel: another agent serves {former.spec.options.name!r} now, "
                f"{former.spec.owner} with {former.id}; this one may when that has ended (replace=no)"
            )

    async def _evict(self, holder: ReservationKey | None) -> None:
        """Close whatever this holder has open. Several newcomers at once evict one another, the last one stays."""
        while (former := self._former(holder)) is not None:
            former.close("replaced: its owner opened it anew")
            await former.wait_closed()

    def _giving_way(self, holder: ReservationKey | None) -> int:
        """Tunnels that do not stand in the way of one for this holder: that which is replaced by it, and of those that
        are being drained one, or a credential could have only its last tunnel's visitors finish by serving nobody new.
        """
        theirs = [one for one in self._tunnels.values() if holder is not None and self.reservations.has(one.id, holder)]
        drained = sum(tunnel.phase is Phase.DRAINING for tunnel in theirs)
        return min(drained, 1) + (len(theirs) > drained)

    async def _run(self, tunnel: Tunnel, *, task_status: trio.TaskStatus[None]) -> None:
        """One tunnel's life: a bug costs this tunnel, never the daemon."""
        try:
            await tunnel.run(task_status=task_status)
        except Exception as error:
            tunnel.fail(error)
        finally:
            self._remove(tunnel)
            self._leave(tunnel)

    def _leave(self, tunnel: Tunnel) -> None:
        """What becomes of its address. Those that end with the daemon stay in the book as they are."""
        keep = tunnel.id not in self._given_up
        self._given_up.discard(tunnel.id)
        if not (keep and (self.draining or tunnel.reason == STOPPED)):
            self.reservations.leave(tunnel, keep=keep)

    def _announce(self, tunnel: Tunnel) -> None:
        facts = {
            "backend": tunnel.spec.backend,
            "server": str(tunnel.server_uri),
            "client": str(tunnel.client_uri),
            "owner": tunnel.spec.owner,
            "name": tunnel.spec.options.name,
        }
        self.events.publish("opened", id=tunnel.id, **facts)
        log.info("tunnel opened", tunnel=tunnel.id, **{**facts, "server": tunnel.server_uri.without_key})

    @staticmethod
    def _reachable(bound: str, asker: Requester) -> str:
        """What to advertise where no name is configured: the bound address, or, for a wildcard, the one the asker
        reached.
        """
        return asker.local_host if is_wildcard(bound) else bound
