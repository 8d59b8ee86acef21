"""Reserved addresses, as tunnels open and close: the table of reservations, its limits, and the store on disk.

Only a tunnel with a name has a reservation: with the name its holder requests the address again. When a tunnel closes,
its address stays reserved for `tunnels.reservation` seconds, unless it was closed by request. When it closes with the
daemon, that time begins when the daemon has started again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from tunneld.config.schema import Settings
from tunneld.directory.store import ReservationStore
from tunneld.errors import NoSuchTunnelError, UsageError
from tunneld.net.address import Address, HostName, Port, Private
from tunneld.policy.access import Grant
from tunneld.policy.reservations import Reservation, ReservationKey, ReservationTable

log: structlog.stdlib.BoundLogger = structlog.get_logger("reservations")


@dataclass(frozen=True, slots=True)
class ReservationView:
    """A reservation for users: `tunnel` is the id of its open tunnel; without one, it expires in `left` seconds."""

    record: Reservation
    tunnel: str | None
    left: float | None


class Reservations:
    """The reservations of this process."""

    def __init__(self, settings: Callable[[], Settings], state: Path | None) -> None:
        """`state` is the directory of the file; None: they are kept in memory only."""
        self.table = ReservationTable()
        self._settings = settings
        self._store = ReservationStore(self.table, state)
        self._open: dict[ReservationKey, list[str]] = {}  # ids of the open tunnels of each holder, oldest first

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the stored reservations, then store changes until cancelled."""
        settings = self._settings()
        await self._store.open(settings.tunnels.reservation)
        try:
            self.retain({credential.name for credential in settings.credential})
        except BaseException:
            await self._store.close()
            raise
        await self._store.run(task_status=task_status)

    @property
    def place(self) -> str:
        """Where they are stored: the path of the file, or `memory`."""
        return self._store.place

    async def saved(self) -> None:
        """Wait until all changes are on disk; see `ReservationStore.saved`."""
        await self._store.saved()

    def retain(self, credentials: Collection[str]) -> None:
        """Drop the reservations of all credentials that are not among these names."""
        for record in self.table.retain(credentials):
            log.info("reservation dropped: its credential was removed", **_log_fields(record))

    # Called by the directory

    def of(self, holder: ReservationKey | None) -> Reservation | None:
        """The reservation of this holder."""
        self.table.expire(trio.current_time())
        return self.table.find(holder) if holder is not None else None

    def superseded_by(self, holder: ReservationKey | None, address: Address) -> Reservation | None:
        """The reservation of this address that the holder made earlier, from another address."""
        return next((each for each in self._others(holder, address) if _has_moved(each, holder, address)), None)

    def why_refused(self, holder: ReservationKey | None, address: Address, grant: Grant) -> str:
        """Why this holder cannot have an address: it is reserved for a closed tunnel of another holder. Else empty."""
        others = (each for each in self._others(holder, address) if not _has_moved(each, holder, address))
        return next((_reserved(each, address, grant) for each in others), "")

    def _others(self, holder: ReservationKey | None, address: Address) -> Iterator[Reservation]:
        """The reservations of this address for closed tunnels of other holders."""
        self.table.expire(trio.current_time())
        return (each for each in self.table.holding(address) if each.holder != holder and each.expires is not None)

    def hold(self, tunnel: str, record: Reservation, superseded: Reservation | None = None) -> None:
        """The tunnel with this id has opened. Called before the next await, or another tunnel could take its port when
        it closes.
        """
        if superseded is not None:
            self.table.drop(superseded.holder)
        self._open.setdefault(record.holder, []).append(tunnel)
        self.table.hold(record)

    def on_closed(self, tunnel: str, holder: ReservationKey, *, keep: bool | None, metered: int = 0) -> None:
        """A tunnel has closed. `keep` its reservation for `tunnels.reservation` seconds, or drop it; None: leave it as
        it is. `metered` are the bytes that count against the quota of its name.
        """
        self.table.meter(holder, metered)
        self._open[holder].remove(tunnel)
        if self._open[holder]:  # a newer tunnel of the same name has the address
            return
        del self._open[holder]
        settings = self._settings().tunnels
        if keep is None:
            return
        if not keep or settings.reservation == 0:
            self.table.drop(holder)
            return
        for record in self.table.keep_until(
            holder,
            trio.current_time() + settings.reservation,
            max_kept=settings.max_reservations,
            max_per_owner=settings.max_reservations_per_owner,
        ):
            log.warning("reservation dropped: too many reservations, and this was the oldest", **_log_fields(record))

    # Requests of users

    def kept(self, grant: Grant) -> Sequence[ReservationView]:
        """The reservations that this grant may see: its own, or all for an admin."""
        self.table.expire(trio.current_time())
        return self._views(self.table, grant)

    def holding(self, address: Address, grant: Grant) -> Sequence[ReservationView]:
        """Those of them with this address; a port may be on either side."""
        self.table.expire(trio.current_time())
        return self._views(self.table.holding(address), grant)

    def _views(self, records: Iterable[Reservation], grant: Grant) -> Sequence[ReservationView]:
        now = trio.current_time()
        return [
            ReservationView(
                record,
                self._open[record.holder][-1] if record.holder in self._open else None,
                None if record.expires is None else record.expires - now,
            )
            for record in records
            if grant.sees_all or record.holder.credential == grant.name
        ]

    def find(self, reference: str, grant: Grant) -> Sequence[ReservationView]:
        """The reservations with this name, or with this address on either side. Raises `NoSuchTunnelError` for none."""
        found = [
            kept
            for kept in self.kept(grant)
            if reference == kept.record.holder.name or reference.lower() in map(str, kept.record.held)
        ]
        if not found:
            raise NoSuchTunnelError(
                f"no reservation is called {reference!r}: use an address or a name as reservations shows it"
            )
        return found

    async def release(self, reference: str, grant: Grant) -> Reservation:
        """Drop one, by its address or its name. Raises `NoSuchTunnelError`, or `UsageError` where its tunnel is open or
        there are several.
        """
        found = self.find(reference, grant)
        if len(found) > 1:
            addresses = ", ".join(kept.record.public for kept in found)
            raise UsageError(f"{len(found)} reservations are called {reference!r}: use an address, {addresses}")
        kept = found[0]
        if kept.tunnel is not None:
            raise UsageError(f"tunnel {kept.tunnel} is open at {kept.record.public}: close {kept.tunnel} first")
        self.table.drop(kept.record.holder)
        log.info("reservation released", **_log_fields(kept.record))
        await self.saved()
        return kept.record


def _has_moved(old: Reservation, new: ReservationKey | None, address: Address) -> bool:
    """Whether the new holder can be the old one at another address. Without credentials a requester that knows both
    name and address may claim that: it could release the reservation as well.
    """
    former = old.holder
    anonymous = new is not None and not former.credential and not new.credential and former.name == new.name
    return anonymous and address in old.addresses


def _reserved(record: Reservation, address: Address, grant: Grant) -> str:
    tunnel, hint = "another tunnel", ""
    if grant.is_admin:
        owner = record.holder.credential or record.holder.host
        tunnel, hint = f"tunnel {record.holder.name!r} of {owner}", f"; release {address} frees it"
    kinds = {Port: "port", HostName: "host name", Private: "private tunnel"}
    what = f"{kinds[type(address)]} {address}"
    return f"could not open a tunnel: {what} is reserved for {tunnel}, now closed (tunnels.reservation){hint}"


def _log_fields(record: Reservation) -> dict[str, object]:
    holder = record.holder
    return {"name": holder.name, "owner": holder.credential or holder.host, "address": record.public}
