"""What `-R` requests: a new tunnel, or a share in an open one.

    Forward            one `-R` of one connection: a `VisitorCarrier` of its tunnel, see backends/mux_side.py
    Leases             which tunnels were opened by `-R`, by owner and label

**Reconnecting.** A client that reconnects with the same key, user name and -R gets the same address. A tunnel that was
opened by `-R` survives a lost connection for `open_timeout`, and its visitors wait. Its label is the user name and a
digest of the credential, the public key, the user name and the -R, by which the tunnel is found again.

If the former client is still alive, there are two clients with the same label, and the tunnel of the second one gets
the next label (`-2`). The relay finds out with a keepalive, which the former client must answer within `ssh.patience`.

**Addresses.** A bind address that is no address of this host is a host name: `-R blog:80:localhost:8000`. A client that
requests a port by number, or a host name, gets it from a dead client of the same credential. The dead client's tunnel
is closed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import structlog
import trio

from tunneld.backends.ssh.login import SshLogin
from tunneld.backends.ssh.side import SshServerSide, find_side
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.errors import LimitReachedError, NotAllowedError, TunneldError, UsageError
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.net.address import Address, Port
from tunneld.net.endpoint import Peer
from tunneld.policy.access import Grant
from tunneld.policy.names import complete_name
from tunneld.policy.options import ANY_HOST, ANYWHERE, MAX_NAME, TunnelOptions, parse_hosts
from tunneld.tunnel.tunnel import Phase, Tunnel

if TYPE_CHECKING:
    from tunneld.backends.ssh.paths import ForwardCarrier

log = structlog.get_logger("ssh")

DIGEST_DIGITS = 8
"""Hexadecimal digits of a label's digest: no collisions among the few tunnels of one credential and user name."""
LISTEN_HOSTS = frozenset({"", "*", "localhost", "0.0.0.0", "::", "127.0.0.1", "::1"})
"""The bind addresses that clients send for `-R PORT:...`, and explicit ones that mean any address or this host."""
WEB_PORTS = frozenset({0, 80, 443})
"""Ports that a -R with a host name may give. Visitors reach the name on the ports that all host names share."""


class Forward:
    """One `-R`: a `VisitorCarrier` of its tunnel. It owns the channels of its visitors."""

    def __init__(
        self,
        carrier: ForwardCarrier,
        requested: tuple[str, int],
        ordinal: int,
        max_channels: Callable[[], int],
        on_closed: Callable[[Forward, str], None],
    ) -> None:
        """`requested` is the address and port of the -R, and `ordinal` tells equal ones of one connection apart.
        `max_channels` returns how many channels the connection may have.
        """
        self.requested = requested
        self.place = requested  # with the port that was allocated for port 0: how the client knows this forward
        self.ordinal = ordinal
        self.carrier = carrier
        self.channels: dict[int, Channel] = {}
        self.over = self.cancelled = False
        self.side: SshServerSide | None = None  # of the tunnel that it serves, once it does
        self.tunnel: Tunnel | None = None  # that it opened or rejoined; None: it serves a tunnel by its key
        self._begun = False
        self._max_channels = max_channels
        self._on_closed = on_closed

    @property
    def channels_left(self) -> int:
        """See `VisitorCarrier.channels_left`."""
        if self.over or not self._begun:
            return 0
        return max(0, self._max_channels() - self.carrier.connection.channel_count)

    @property
    def heartbeat(self) -> Heartbeat:
        """See `VisitorCarrier.heartbeat`."""
        return self.carrier.heartbeat

    @property
    def answering(self) -> bool:
        """See `VisitorCarrier.answering`."""
        return self.heartbeat.received or not self.heartbeat.unresponsive

    def join(self, side: SshServerSide, peer: Peer, max_carriers: int) -> None:
        """Serve this tunnel. Raises as `MuxServerSide.admit`, and `NotAllowedError` if the connection is lost."""
        if self.over:
            raise NotAllowedError("the connection was lost")
        side.admit(self, peer, max_carriers)
        self.side = side

    @property
    def port(self) -> int:
        """The public port; 0 before `join`."""
        return self.side.client_port if self.side is not None else 0

    def begin(self) -> None:
        """The client has received the reply to its -R: visitors may come."""
        self._begun = True
        if self.side is not None and not self.over:
            self.side.on_capacity()

    def open(self, _port: int) -> Channel:
        """See `VisitorCarrier.open`."""
        if not self.channels_left:
            raise LimitReachedError("could not open a channel: the ssh connection has as many as it may (max_channels)")
        channel = self.carrier.open(self)
        self.channels[channel.sid] = channel
        return channel

    def on_capacity(self, channel: Channel) -> None:
        """See `ForwardEvents.on_capacity`."""
        self.channels.pop(channel.sid, None)
        if self.side is not None:
            self.side.on_capacity()

    def close(self, reason: str) -> None:
        """End this forward and reset its visitors; the tunnel stays open. Idempotent."""
        if self.over:
            return
        self.over = True
        for channel in list(self.channels.values()):
            channel.reset(reason)
            channel.notify_reset(reason)
        if self.side is not None:
            self.side.on_carrier_closed(self)
        self._on_closed(self, reason)

    def cancel(self) -> None:
        """The client cancelled the -R: end this forward and the tunnel that it opened. Idempotent."""
        if self.over:
            return
        reason = "the ssh client cancelled its -R"
        self.cancelled = True
        self.close(reason)
        if self.tunnel is not None:
            self.tunnel.close(reason)

    async def is_alive(self) -> bool:
        """Whether the client answers a keepalive in time, and does not end the forward meanwhile."""
        if self.over:
            return False
        return await self.carrier.is_alive()


@dataclass(slots=True)
class Lease:
    """A tunnel that was opened by `-R`, and the last forward that served it."""

    tunnel: Tunnel
    forward: Forward

    @property
    def is_open(self) -> bool:
        """Whether the tunnel takes visitors."""
        return self.tunnel.phase not in {Phase.DRAINING, Phase.CLOSED}


class Leases:
    """The leases of all connections."""

    def __init__(self, service: TunnelService, max_carriers: Callable[[], int]) -> None:
        self._service = service
        self._max_carriers = max_carriers
        self._leases: dict[tuple[str, str], Lease] = {}  # by owner and label
        self._locks: dict[str, trio.Lock] = {}  # by owner: two equal clients must not take the same label at once

    async def take(self, login: SshLogin, requester: Requester, peer: Peer, forward: Forward) -> Tunnel:
        """Find or open the tunnel of one `-R`, and let `forward` serve it. Raises as `TunnelService.open_tunnel`."""
        (host, port), grant = forward.requested, requester.known_grant
        await self._service.authority.check_login(grant, requester.host)
        hosts, address = self._requested(host, port)
        base = label_of(login, f"{host}:{port}:{forward.ordinal}")
        async with self._locks.setdefault(login.owner, trio.Lock()):
            self._remove_closed()
            if address is not None:
                await self._free(login.owner, grant, address, base)
            for number in count(1):
                label = base if number == 1 else f"{base}-{number}"
                lease = self._leases.get((login.owner, label))
                if lease is None or not await self._is_taken(lease):
                    break
            former = await self._service.find_named(label, requester)  # perhaps opened before the daemon was restarted
            if former is not None and self._rejoin(former, forward, peer):
                self._leases[login.owner, label] = Lease(former, forward)
                return former
            options = TunnelOptions(
                persist=True,
                server_from=ANYWHERE if grant.server_from is None else None,
                client_port=address.number if isinstance(address, Port) else None,
                host=hosts,
                name=label,
            )
            tunnel = await self._service.open_tunnel("ssh", options, requester)
            try:
                self._attach(tunnel, forward, peer)
            except TunneldError:
                tunnel.close("its ssh connection was not admitted")
                raise
            self._leases[login.owner, label] = Lease(tunnel, forward)
            return tunnel

    def _requested(self, host: str, port: int) -> tuple[tuple[str, ...], Address | None]:
        """The option `host` for a -R with this bind address and port, and the port or name that it asks for. Raises
        `NotAllowedError`.
        """
        if host.lower() in LISTEN_HOSTS:
            return (), Port(port) if port else None
        names = self._service.names
        try:
            if names is None or not names.is_open:
                raise UsageError("this relay has no host names")
            if port not in WEB_PORTS:
                raise UsageError("visitors of a host name come to the HTTP port of the relay: use -R NAME:80:HOST:PORT")
            hosts = parse_hosts(host)
            return hosts, None if hosts == (ANY_HOST,) else complete_name(host, names.settings().domain)
        except (UsageError, ValueError) as error:
            raise NotAllowedError(
                f"cannot listen on {host[:80]!r}: {error}; for a port, use -R 0:HOST:PORT or -R PORT:HOST:PORT"
            ) from None

    def _attach(self, tunnel: Tunnel, forward: Forward, peer: Peer) -> None:
        side = find_side(self._service.keys, tunnel.server_uri.key)
        if side is None:
            raise NotAllowedError("the tunnel closed")
        forward.tunnel = tunnel
        forward.join(side, peer, self._max_carriers())

    def _rejoin(self, tunnel: Tunnel, forward: Forward, peer: Peer) -> bool:
        """Let `forward` serve an open tunnel; False if it is not admitted."""
        try:
            self._attach(tunnel, forward, peer)
        except TunneldError as error:
            log.info("could not rejoin the former tunnel", tunnel=tunnel.id, reason=str(error))
            return False
        return True

    async def _is_taken(self, lease: Lease) -> bool:
        """Whether the client of a lease is alive; if it is not, its connection is closed."""
        if not lease.forward.over and await lease.forward.is_alive():
            return lease.is_open
        lease.forward.carrier.transport.end("replaced by a new connection because it did not answer")
        return False

    async def _free(self, owner: str, grant: Grant, address: Address, label: str) -> None:
        """Free a port or a host name that this owner holds under another label: close the tunnel of a dead client, and
        release a reservation without a tunnel.
        """
        for (other, other_label), lease in list(self._leases.items()):
            holds = other == owner and lease.is_open and address in lease.tunnel.addresses
            if holds and other_label != label and not await self._is_taken(lease):
                await self._service.close(lease.tunnel.id)  # closed on request, so the address is not reserved
        for kept in self._service.reservations.holding(address, grant):
            holder = kept.record.holder
            unused = kept.tunnel is None and address in kept.record.addresses
            if unused and holder.credential == owner and holder.name != label:
                await self._service.reservations.release(str(address), grant)

    def _remove_closed(self) -> None:
        for key in [key for key, lease in self._leases.items() if not lease.is_open]:
            del self._leases[key]


def label_of(login: SshLogin, request: str) -> str:
    """The label of a tunnel: the valid characters of the user name, and a digest of all that identifies the client and
    its -R.
    """
    user = re.sub(r"[^A-Za-z0-9._-]", "", login.user).lstrip("._-") or "ssh"
    facts = f"{login.owner}\x00{login.proof}\x00{login.user}\x00{request}"
    digest = hashlib.sha256(facts.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_DIGITS]
    return f"{user[: MAX_NAME - DIGEST_DIGITS - 6]}-{digest}"
