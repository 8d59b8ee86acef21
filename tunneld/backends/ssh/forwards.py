"""What `-R` asks for: a tunnel of its own, or a place on one that is open.

    Forward            one `-R` of one connection: a carrier of its tunnel, as backends/carried.py knows them
    Leases             who has opened which tunnel by `-R`, and under which name

**Coming back.** A tunnel that `-R` opened outlives a lost connection by `open_timeout`, while its visitors wait. It is
called after whoever opened it: the user's name and a digest of credential, key, name and what was asked for. Whoever
comes with the same is the same, and has the same tunnel again. Unless the former is alive: then there are two who look
alike, and the newcomer's tunnel has the next name. That is found out by asking the former for a sign of life, which it
has `ssh.patience` to give.

Who asks for a port by number, and finds it held by a dead session of the same credential, has it at once, too: that
tunnel is closed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import structlog
import trio

from tunneld.backends.ssh.carrier import SshCarrier
from tunneld.backends.ssh.login import SshLogin
from tunneld.backends.ssh.side import SshServerSide, find_side
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.errors import LimitReachedError, NotAllowedError, TunneldError
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.policy.access import Grant
from tunneld.policy.options import ANYWHERE, MAX_NAME, TunnelOptions
from tunneld.tunnel.tunnel import Phase, Tunnel

log = structlog.get_logger("ssh")

DIGITS = 8
"""Of a digest, in hexadecimal: among the few tunnels of one credential and name, none meets another by chance."""
HERE = frozenset({"", "*", "localhost", "0.0.0.0", "::", "127.0.0.1", "::1"})
"""What clients say for `-R PORT:...`, with or without an address in front that means any or this one."""


class Forward:
    """One `-R`: a carrier of its tunnel, and the owner of its visitors' channels."""

    def __init__(
        self,
        carrier: SshCarrier,
        wish: tuple[str, int],
        ordinal: int,
        most: Callable[[], int],
        on_closed: Callable[[Forward, str], None],
    ) -> None:
        """`wish` is what was asked for, and `ordinal` tells those of one connection apart that ask for the same; `most`
        says how many channels the connection may have.
        """
        self.wish = self.place = wish  # `place` is what the client calls it by
        self.ordinal = ordinal
        self.carrier = carrier
        self.channels: dict[int, Channel] = {}
        self.over = self.cancelled = False
        self.side: SshServerSide | None = None  # of the tunnel that it is a carrier of, once that is known
        self.tunnel: Tunnel | None = None  # that it opened; None: it joined one
        self._begun = False
        self._most = most
        self._on_closed = on_closed

    @property
    def channels_left(self) -> int:
        """See `Carrying`."""
        return 0 if self.over or not self._begun else max(0, self._most() - self.carrier.connection.channel_count)

    @property
    def heartbeat(self) -> Heartbeat:
        """See `Carrying`."""
        return self.carrier.heartbeat

    @property
    def answering(self) -> bool:
        """See `Carrying`."""
        return self.heartbeat.received or not self.heartbeat.unresponsive

    def join(self, side: SshServerSide, peer: Any, most: int) -> None:
        """Become a carrier of a tunnel that has at most so many. Raises as `Carried.admit`, and `NotAllowedError`."""
        if self.over:
            raise NotAllowedError("the connection is gone")
        side.admit(self, peer, most)
        self.side = side

    @property
    def port(self) -> int:
        """That visitors reach."""
        return self.side.client_port if self.side is not None else 0

    def begin(self) -> None:
        """The client knows of it: visitors may come."""
        self._begun = True
        if self.side is not None and not self.over:
            self.side.on_capacity()

    def open(self, _port: int) -> Channel:
        """See `Carrying`."""
        if not self.channels_left:
            raise LimitReachedError("could not open a channel: its ssh has as many as it may have")
        channel = self.carrier.open(self)
        self.channels[channel.sid] = channel
        return channel

    def on_capacity(self, channel: Channel) -> None:
        """See `carrier.Owner`."""
        self.channels.pop(channel.sid, None)
        if self.side is not None:
            self.side.on_capacity()

    def close(self, reason: str) -> None:
        """The tunnel wants no more of it, or the client does not. Harmless when repeated."""
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
        """The client wants it no more: what it opened is closed."""
        if self.over:
            return
        self.cancelled = True
        self.close("its ssh ended the forward")
        if self.tunnel is not None:
            self.tunnel.close("its ssh ended the forward")

    async def is_alive(self) -> bool:
        """Ask its client for a sign of life. False also where it ends meanwhile."""
        if self.over:
            return False
        return await self.carrier.is_alive()


@dataclass(slots=True)
class Lease:
    """A tunnel that `-R` opened; `forward` is the last one of it."""

    tunnel: Tunnel
    forward: Forward

    @property
    def is_open(self) -> bool:
        """Whether the tunnel takes anybody."""
        return self.tunnel.phase not in {Phase.DRAINING, Phase.CLOSED}


class Leases:
    """All of them, of all connections."""

    def __init__(self, service: TunnelService, max_carriers: Callable[[], int]) -> None:
        self._service = service
        self._max_carriers = max_carriers
        self._leases: dict[tuple[str, str], Lease] = {}  # by owner and name
        self._locks: dict[str, trio.Lock] = {}  # by owner: two that look alike must not both find nobody

    async def take(self, login: SshLogin, grant: Grant, asker: Requester, peer: Any, forward: Forward) -> Tunnel:
        """A tunnel for one `-R`, and the forward on it. Raises as `TunnelService.open_tunnel`."""
        host, port = forward.wish
        if host.lower() not in HERE:
            raise NotAllowedError(
                f"{host[:80]!r} cannot be had: names are kept for HTTP to come; say -R 0:... or -R PORT:..."
            )
        base = name_of(login, f"{host}:{port}:{forward.ordinal}")
        async with self._locks.setdefault(login.owner, trio.Lock()):
            self._forget_closed()
            if port:
                await self._free_port(login.owner, grant, port, base)
            for number in count(1):
                name = base if number == 1 else f"{base}-{number}"
                lease = self._leases.get((login.owner, name))
                if lease is None or not await self._is_taken(lease):
                    break
            former = self._service.find_named(name, asker)  # also one that a daemon before this one had opened
            if former is not None and self._join(former, forward, peer):
                self._leases[login.owner, name] = Lease(former, forward)
                return former
            options = TunnelOptions(
                persist=True,
                server_from=ANYWHERE if grant.server_from is None else None,
                client_port=port or None,
                name=name,
            )
            tunnel = await self._service.open_tunnel("ssh", options, asker)
            try:
                self._attach(tunnel, forward, peer)
            except TunneldError:
                tunnel.close("its ssh was not admitted")
                raise
            self._leases[login.owner, name] = Lease(tunnel, forward)
            return tunnel

    def _attach(self, tunnel: Tunnel, forward: Forward, peer: Any) -> None:
        side = find_side(self._service.keys, tunnel.server_uri.key)
        if side is None:
            raise NotAllowedError("the tunnel closed")
        forward.tunnel = tunnel
        forward.join(side, peer, self._max_carriers())

    def _join(self, tunnel: Tunnel, forward: Forward, peer: Any) -> bool:
        """Take the former place on an open tunnel; whether that was possible."""
        try:
            self._attach(tunnel, forward, peer)
        except TunneldError as error:
            log.info("could not have its former tunnel", tunnel=tunnel.id, reason=str(error))
            return False
        return True

    async def _is_taken(self, lease: Lease) -> bool:
        """Whether the session of a lease is alive; one that is not is over now."""
        if not lease.forward.over and await lease.forward.is_alive():
            return lease.is_open
        lease.forward.carrier.transport.end("another came while it did not answer")
        return False

    async def _free_port(self, owner: str, grant: Grant, port: int, name: str) -> None:
        """Close another tunnel of this owner that holds the port for nobody."""
        for (other, other_name), lease in list(self._leases.items()):
            holds = other == owner and lease.is_open and lease.tunnel.client_uri.port == port
            if holds and other_name != name and not await self._is_taken(lease):
                await self._service.close(lease.tunnel.id)  # on purpose: it is not reserved
        for kept in self._service.reservations.kept(grant):
            holder = kept.record.holder
            away = kept.tunnel is None and kept.record.client_port == port
            if away and holder.credential == owner and holder.name != name:
                await self._service.reservations.release(str(port), grant)

    def _forget_closed(self) -> None:
        for key in [key for key, lease in self._leases.items() if not lease.is_open]:
            del self._leases[key]


def name_of(login: SshLogin, wish: str) -> str:
    """What the tunnel is called: the user's name, as far as it is one, and a digest of everything that makes it."""
    user = re.sub(r"[^A-Za-z0-9._-]", "", login.user).lstrip("._-") or "ssh"
    facts = f"{login.owner}\x00{login.proof}\x00{login.user}\x00{wish}"
    digest = hashlib.sha256(facts.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
    return f"{user[: MAX_NAME - DIGITS - 6]}-{digest}"
