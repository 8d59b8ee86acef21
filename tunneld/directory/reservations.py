"""Which address is whose, as tunnels come and go: the book of reservations, its limits, and the disk behind it.

Only a tunnel with a name has a reservation: its holder can say which one it wants back. A tunnel that ends leaves its
address reserved for `tunnels.reservation` seconds, however it ended, unless it was closed on purpose. One that ends
with the daemon keeps it: the time begins when the daemon is there again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from tunneld.config.schema import Settings
from tunneld.directory.store import ReservationStore
from tunneld.errors import LimitReachedError, NoSuchTunnelError, UsageError
from tunneld.policy.access import Grant
from tunneld.policy.reservations import Reservation, ReservationKey, ReservationTable
from tunneld.tunnel.tunnel import Tunnel

log: structlog.stdlib.BoundLogger = structlog.get_logger("addresses")


@dataclass(frozen=True, slots=True)
class ReservationView:
    """A reservation as people see it; `tunnel` is the id of the one that is open at it, else `left` is in seconds."""

    record: Reservation
    tunnel: str | None
    left: float | None


class Reservations:
    """Reservations of this process."""

    def __init__(self, settings: Callable[[], Settings], state: Path | None) -> None:
        """`state` is the folder where they are kept; None: in memory only."""
        self.table = ReservationTable()
        self._settings = settings
        self._ledger = ReservationStore(self.table, state)
        self._holders: dict[str, ReservationKey] = {}  # of tunnels that are open, by their ids

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read what there is, then keep it until cancelled."""
        settings = self._settings()
        await self._ledger.open(settings.tunnels.reservation)
        try:
            self.retain({credential.name for credential in settings.credential})
        except BaseException:
            await self._ledger.close()
            raise
        await self._ledger.run(task_status=task_status)

    @property
    def place(self) -> str:
        """Where they are kept: a file, or `memory`."""
        return self._ledger.place

    async def saved(self) -> None:
        """Wait until what changed is on disk; see `ReservationStore.saved`."""
        await self._ledger.saved()

    def retain(self, credentials: Collection[str]) -> None:
        """Give up what belongs to credentials that are no more."""
        for record in self.table.retain(credentials):
            log.info("reservation dropped: its credential is no more", **_facts(record))

    # What the tunnels do

    def recall(self, holder: ReservationKey | None, port: int | None, grant: Grant) -> Reservation | None:
        """What is kept for this holder, who asks for `port` or for none. Raises `LimitReachedError` where that is kept
        for somebody else.
        """
        self.table.expire(trio.current_time())
        for other in [record for record in self.table if port in record.ports and record.expires is not None]:
            if other.holder != holder and not (holder and _moved(other.holder, holder) and other.client_port == port):
                raise LimitReachedError(_taken(other, port, grant))
            if other.holder != holder:
                self.table.drop(other.holder)
        return self.table.find(holder) if holder is not None else None

    def has(self, tunnel: str, holder: ReservationKey | None) -> bool:
        """Whether the open tunnel with this id is that of the holder."""
        return self._holders.get(tunnel) == holder

    def hold(self, holder: ReservationKey | None, tunnel: Tunnel) -> None:
        """A tunnel has opened; before anything is awaited, or another could take its port when it closes."""
        if holder is not None:
            self._holders[tunnel.id] = holder
            self.table.hold(Reservation(holder, tunnel.spec.backend, tunnel.client_uri.port, tunnel.server_uri))

    def leave(self, tunnel: Tunnel, *, keep: bool) -> None:
        """A tunnel has closed: does its address stay its own?"""
        holder = self._holders.pop(tunnel.id, None)
        if holder is None or holder in self._holders.values():  # another one of the same name took over
            return
        settings = self._settings().tunnels
        if not keep or settings.reservation == 0:
            self.table.drop(holder)
            return
        for record in self.table.leave(
            holder,
            trio.current_time() + settings.reservation,
            most=settings.max_reservations,
            most_per_owner=settings.max_reservations_per_owner,
        ):
            log.warning("reservation dropped: there are too many, and it is the oldest", **_facts(record))

    # What people ask

    def kept(self, grant: Grant) -> Sequence[ReservationView]:
        """All that are there for this grant: its own, or everybody's for an admin."""
        now = trio.current_time()
        self.table.expire(now)
        tunnels = {holder: tunnel for tunnel, holder in self._holders.items()}
        return [
            ReservationView(
                record, tunnels.get(record.holder), None if record.expires is None else record.expires - now
            )
            for record in self.table
            if grant.is_admin or record.holder.credential == grant.name
        ]

    def find(self, reference: str, grant: Grant) -> Sequence[ReservationView]:
        """Those that have this port, on either side, or this name. Raises `NoSuchTunnelError` where there is none."""
        found = [
            kept
            for kept in self.kept(grant)
            if reference == kept.record.holder.name or reference in map(str, kept.record.ports)
        ]
        if not found:
            raise NoSuchTunnelError(f"no reservation is called {reference!r}: give a port or a name that is listed")
        return found

    async def release(self, reference: str, grant: Grant) -> Reservation:
        """Give one up, by its port or its name. Raises `NoSuchTunnelError`, and `UsageError` where its tunnel is open
        or there are several.
        """
        found = self.find(reference, grant)
        if len(found) > 1:
            ports = ", ".join(str(kept.record.client_port) for kept in found)
            raise UsageError(f"{len(found)} reservations are called {reference!r}: say which by its port, {ports}")
        kept = found[0]
        if kept.tunnel is not None:
            raise UsageError(
                f"tunnel {kept.tunnel} is open at port {kept.record.client_port}: close {kept.tunnel} first"
            )
        self.table.drop(kept.record.holder)
        log.info("reservation released", **_facts(kept.record))
        await self.saved()
        return kept.record


def reservation_key(name: str, credential: str, host: str) -> ReservationKey | None:
    """Whose the address of a tunnel of this `name` is, asked for by `credential`, or where nobody has one from `host`;
    None where it has no name.
    """
    return ReservationKey(credential, name, "" if credential else host) if name else None


def _moved(old: ReservationKey, new: ReservationKey) -> bool:
    """Whether the new one may say that it is the old one at another address. Without credentials whoever knows both
    name and port may: it could release the reservation as well.
    """
    return not old.credential and not new.credential and old.name == new.name


def _taken(record: Reservation, port: int | None, grant: Grant) -> str:
    whose, hint = "another tunnel, which is away", ""
    if grant.is_admin:
        owner = record.holder.credential or record.holder.host
        whose, hint = f"tunnel {record.holder.name!r} of {owner}, which is away", f"; release {port} gives it up"
    return f"could not open a tunnel: port {port} is reserved for {whose} (tunnels.reservation){hint}"


def _facts(record: Reservation) -> dict[str, object]:
    holder = record.holder
    return {"name": holder.name, "owner": holder.credential or holder.host, "port": record.client_port}
