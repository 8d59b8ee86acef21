"""What a relay of several machines shares about its tunnels: a record for each, in a directory.

    Directory                   which tunnels there are, and which addresses are reserved; asynchronous
    └─ TunnelRecord ×N          a value: where a tunnel is, and whose
         node ──► Tunnel        the tunnel itself, with its connections, at the node of its record

A tunnel is asked for by id, address or name in the directory, and its record leads to the node that has it; see
`TunnelService.local`. Today there is one node and one directory, `LocalDirectory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tunneld.errors import TunneldError
from tunneld.net.address import Address, HostName, Private
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import Grant
from tunneld.policy.ports import Owner, PortChoice
from tunneld.policy.reservations import Reservation, ReservationKey


@dataclass(frozen=True, slots=True)
class TunnelRecord:
    """One tunnel, as any node may know it."""

    uid: str  # globally unique, and never used again
    id: str  # for users: short, and unique on its node
    owner: str  # the name of the credential; empty without credentials
    host: str  # the address from which it was requested
    name: str
    backend: str
    server: Endpoint = field(repr=False)  # the server URI, with its key, a secret
    client: Endpoint  # the first public URI
    addresses: tuple[Address, ...]  # the public addresses
    ports: tuple[int, ...]  # of its own, on both sides
    node: str
    generation: int  # of the tunnels with its name and owner; a later tunnel has a larger one
    opened: float  # seconds since 1970
    metered: int = 0  # bytes that count against the quota of its name

    @property
    def holder(self) -> ReservationKey | None:
        """The holder of its addresses, if it has a name."""
        node = next((str(address.node) for address in self.addresses if isinstance(address, Private)), "")
        return reservation_key(self.name, self.owner, node or self.host)

    @property
    def port_owner(self) -> Owner:
        """The owner of its ports."""
        return port_owner(self.owner, self.host)


@dataclass(frozen=True, slots=True)
class AddressClaim:
    """What a request for a tunnel finds in the directory: the tunnels of its holder, and what is reserved."""

    records: Sequence[TunnelRecord]  # of the same holder, draining ones included, oldest first
    reservation: Reservation | None  # of the holder
    refusal: str  # why the requested port belongs to another holder; empty: it does not
    superseded: Reservation | None  # the holder's own at another address, to be dropped


class Directory(Protocol):
    """Which tunnels there are on all nodes. A method may wait for the network, and raise `StoreError`."""

    @property
    def node(self) -> str:
        """The name of this node."""

    async def find(self, reference: str) -> TunnelRecord | None:
        """The tunnel with this id, URI or public port. Of several the newest: the older ones are draining and gave
        their address up. Raises `UsageError` where the reference is no URI although it contains `://`.
        """

    async def held_by(self, holder: ReservationKey | None) -> Sequence[TunnelRecord]:
        """The tunnels of this holder, oldest first."""

    async def list(self, owner: str | None = None) -> Sequence[TunnelRecord]:
        """The tunnels of a credential, or all, oldest first."""

    async def claim(
        self, holder: ReservationKey | None, owner: Owner, ports: Sequence[int], grant: Grant
    ) -> AddressClaim:
        """Look up what a request for a tunnel, perhaps on certain ports, has to know. Changes nothing."""

    async def why_names_refused(
        self, holder: ReservationKey | None, names: Sequence[HostName], owner: Owner, grant: Grant
    ) -> str:
        """Why this holder cannot have these host names: one is reserved for a closed tunnel of another holder, or
        another credential has a path of it, or they would be too many. Else empty.
        """

    async def why_private_refused(self, holder: ReservationKey | None, address: Private, grant: Grant) -> str:
        """Why this holder cannot have the address of a private tunnel: it is open, or reserved, for another holder.
        Else empty.
        """

    async def open(self, record: TunnelRecord, claim: AddressClaim) -> None:
        """Enter a tunnel that is about to begin, and reserve its addresses for its holder."""

    async def remove(self, record: TunnelRecord, *, keep: bool | None) -> None:
        """Remove a tunnel that has closed. `keep` its reservation for `tunnels.reservation` seconds, or drop it; None:
        it closed with the daemon, and its reservation stays as it is.
        """

    async def meter(self, record: TunnelRecord, metered: int) -> None:
        """An open tunnel has relayed so many bytes that count against the quota of its name. Does not wait until this
        is stored.
        """

    async def note_end(self, server: Endpoint, owner: str, error: TunneldError) -> None:
        """Remember why the tunnel with this server URI has ended for good, so that its agent does not open it again.
        Of several reasons the first is remembered.
        """

    async def why_ended(self, server: Endpoint) -> tuple[str, TunneldError | None]:
        """The owner of a tunnel that has ended for good, by its server URI, and the error for its agent."""

    async def saved(self) -> None:
        """Wait until all changes so far would survive a power cut, or cannot be stored."""

    async def update(self, record: TunnelRecord) -> None:
        """The server URI of a tunnel has changed: a reload moved a shared port, or gave it another scheme."""

    def ports(self, owner: Owner) -> PortChoice:
        """The ports that a new tunnel of this owner may get."""

    def ports_held(self, owner: Owner, ports: range) -> int:
        """How many of these ports an owner has, for tunnels that are open and reserved for ones that are not."""


def reservation_key(name: str, credential: str, host: str) -> ReservationKey | None:
    """The holder of the address of a tunnel with this `name` and `credential`, or, without credentials, of one that
    was requested from `host`; the holder of a private tunnel is then the node whose id takes the place of `host`. None
    where the tunnel has no name.
    """
    return ReservationKey(credential, name, "" if credential else host) if name else None


def port_owner(credential: str, host: str) -> Owner:
    """The owner of ports: a credential or, without credentials, the requester's address."""
    return credential, "" if credential else host
