"""What the verbs of the control protocol do: a function each, in the order of the table in `commands`.

A function gets the daemon, the request and who asks, and returns a `Reply` or raises a `TunneldError`. What a caller
has no part in does not exist for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from tunneld.config.keys import keys, value
from tunneld.config.schema import Settings
from tunneld.config.values import literal
from tunneld.control.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.directory.reservations import ReservationView
from tunneld.directory.service import TunnelService
from tunneld.errors import UsageError
from tunneld.net.endpoint import format_peer
from tunneld.policy.access import Grant
from tunneld.policy.options import ANYWHERE, TunnelOptions
from tunneld.policy.units import count
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.lines import Item, Request

MAX_TRIM = 1_000_000
"""Parked connections: far above any `tunnels.max_parked`."""


class DaemonControl(Protocol):
    """What the verbs need of the process around them."""

    @property
    def service(self) -> TunnelService:
        """The tunnels."""

    @property
    def settings(self) -> Settings:
        """The settings in force."""

    def status(self) -> Item:
        """The process in one line of facts."""

    def reload(self) -> Sequence[Item]:
        """Read the configuration file again; one item for each key that changed. Raises `ConfigError`, and changes
        nothing then.
        """

    def shutdown(self, *, drain: bool) -> None:
        """End the process, with or without letting the relays finish."""

    async def restart(self) -> None:
        """Begin to become the program as it is on the disk now. Raises `ConfigError`, `DrainingError`, `UsageError`."""


async def open_tunnel(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """Open a tunnel; the text is its server URI."""
    backend = request.args[0] if request.args else "tcp"
    options = TunnelOptions.parse(request.options)
    tunnel = await daemon.service.open_tunnel(backend, options, caller)
    return Reply(text=str(tunnel.server_uri))


async def get_tunnel_address(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """The text is the client URI of the tunnel with this server URI."""
    return Reply(text=str(daemon.service.get_tunnel_address(request.args[0], known(caller))))


async def list_tunnels(daemon: DaemonControl, _request: Request, caller: Requester) -> Reply:
    """One item for each open tunnel that the caller may see, oldest first."""
    items = [describe_tunnel(tunnel) for tunnel in daemon.service.tunnels(known(caller))]
    return Reply(text=count(len(items), "tunnel"), items=items)


async def show_tunnel(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """One item for the tunnel, then one for each visitor."""
    tunnel = daemon.service.find(request.args[0], known(caller))
    visitors: list[Item] = [
        {"visitor": format_peer(peer), "up": relay.up, "down": relay.down}
        for relay, peer in tunnel.visitors.relays.items()
    ]
    return Reply(text=count(len(visitors), "visitor"), items=[describe_tunnel(tunnel), *visitors])


async def close_tunnel(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """Stop a tunnel now, and give its address up unless told to keep it."""
    reference, *how = request.args
    if how not in ([], ["keep"]):
        raise UsageError(f"close takes a tunnel and nothing or the word keep, not {how[0]!r}")
    tunnel = await daemon.service.close(reference, known(caller), keep=bool(how))
    return Reply(text=f"closed {tunnel.id}")


async def list_reservations(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """One item for each reservation that the caller may see, or for those of one port or name."""
    addresses, grant = daemon.service.reservations, known(caller)
    found = addresses.find(request.args[0], grant) if request.args else addresses.kept(grant)
    return Reply(text=count(len(found), "reservation"), items=[describe_reservation(kept) for kept in found])


async def release_reservation(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """Give an address up that no open tunnel has."""
    record = await daemon.service.reservations.release(request.args[0], known(caller))
    return Reply(text=f"released port {record.client_port} of {record.holder.name}")


async def drain_tunnel(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """Take nobody new; the tunnel closes when its last relay ends."""
    tunnel = daemon.service.drain_one(request.args[0], known(caller))
    return Reply(text=f"draining {tunnel.id}, {count(len(tunnel.visitors), 'visitor')} left")


async def join_tunnel(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """The agent that asks serves this tunnel, from the address that it asks from."""
    tunnel = daemon.service.join(request.args[0], caller)
    return Reply(text=f"joined {tunnel.id}")


async def leave_tunnel(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """The agent that asks serves this tunnel no more; the last one drains it."""
    tunnel = daemon.service.find(request.args[0], known(caller))
    if tunnel.dismiss(caller.owner):
        return Reply(text=f"draining {tunnel.id}, {count(len(tunnel.visitors), 'visitor')} left")
    return Reply(text=f"left {tunnel.id} to {count(len(tunnel.agents), 'other agent')}")


async def trim_tunnel(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """Close surplus parked server connections."""
    tunnel = daemon.service.find(request.args[0], known(caller))
    keep = request.args[1]
    if not (keep.isascii() and keep.isdigit() and len(keep) <= len(str(MAX_TRIM))):
        raise UsageError(f"not a number of server connections to keep: {keep!r}")
    return Reply(text=f"closed {count(tunnel.trim(int(keep), caller.host), 'parked server connection')} of {tunnel.id}")


async def watch_tunnels(daemon: DaemonControl, request: Request, caller: Requester) -> Reply:
    """A stream of events, of all tunnels that the caller may see or of one. The first says that watching has begun."""
    grant = known(caller)
    tunnel = daemon.service.find(request.args[0], grant).id if request.args else None
    return Reply(stream=_stream(daemon, tunnel, caller))


async def _stream(daemon: DaemonControl, tunnel: str | None, caller: Requester) -> AsyncGenerator[Item, None]:
    """It ends with the first event after the caller's credential is gone, and does not tell it."""
    service = daemon.service

    def wanted(other: str) -> bool:
        grant = caller.grant_now
        return grant is None or (tunnel in {None, other} and service.is_of(grant, other))

    async with service.events.watch(daemon.settings.daemon.watch_backlog, wanted) as watcher:
        yield {"event": "watching", "id": tunnel or "all"}
        async for event in watcher:
            if caller.grant_now is None:
                return
            yield event


async def status(daemon: DaemonControl, _request: Request, _caller: Requester) -> Reply:
    """The process in one item."""
    return Reply(items=[daemon.status()])


async def settings(daemon: DaemonControl, request: Request, _caller: Requester) -> Reply:
    """One item for each key in force whose path begins with what was asked for. Credentials are not among them."""
    prefix = request.args[0].lower() if request.args else ""
    paths = [key.path for key in keys() if not key.repeated and f"{key.path}.".startswith(prefix)]
    if not paths:
        raise UsageError(f"no key begins with {prefix!r}: see tunnel.toml(5)")
    shown = ((path, value(daemon.settings, path)) for path in paths)
    items: list[Item] = [{"key": path, "value": None if found is None else literal(found)} for path, found in shown]
    return Reply(text=count(len(items), "key"), items=items)


async def reload(daemon: DaemonControl, _request: Request, _caller: Requester) -> Reply:
    """Read the configuration again."""
    items = daemon.reload()
    return Reply(text=f"{count(len(items), 'key')} changed", items=items)


async def shut_down(daemon: DaemonControl, request: Request, _caller: Requester) -> Reply:
    """End the daemon, now or after a drain."""
    if request.args not in {(), ("drain",)}:
        raise UsageError(f"shutdown takes nothing or the word drain, not {request.args[0]!r}")
    drain = bool(request.args)
    daemon.shutdown(drain=drain)
    return Reply(text="draining, then stopping" if drain else "stopping")


async def restart(daemon: DaemonControl, _request: Request, _caller: Requester) -> Reply:
    """Become the program as it is on the disk now, and keep what can be kept."""
    await daemon.restart()
    return Reply(text=f"starting again, with {count(len(daemon.service.tunnels()), 'tunnel')}")


def known(caller: Requester) -> Grant:
    """The grant of a caller whose role was checked."""
    return caller.known_grant


def describe_reservation(kept: ReservationView) -> Item:
    """What `reservations` says of one. The server URI would tell its key, so only the port of that is told."""
    record = kept.record
    return {
        "name": record.holder.name,
        "owner": record.holder.credential or record.holder.host,
        "backend": record.backend,
        "client_port": record.client_port,
        "server_port": record.server.port,
        "tunnel": kept.tunnel,
        "left": None if kept.left is None else int(kept.left),
    }


def describe_tunnel(tunnel: Tunnel) -> Item:
    """What `list` and `show` say of a tunnel; times in seconds, sizes in octets."""
    opening, options, terms = tunnel.spec, tunnel.spec.options, tunnel.limits
    up, down = tunnel.octets
    return {
        "id": tunnel.id,
        "name": opening.options.name or None,
        "backend": opening.backend,
        "phase": tunnel.phase.value,
        "server": str(tunnel.server_uri),
        "client": str(tunnel.client_uri),
        "owner": opening.owner,
        "agents": len(tunnel.agents) if options.share else None,
        "secure": None if options.secure == "no" else options.secure,
        "server_from": ANYWHERE if tunnel.agents.networks is None else ",".join(map(str, tunnel.agents.networks)),
        "persist": opening.options.persist,
        "allow_from": ",".join(map(str, options.allow_from)) or None,
        "deny_from": ",".join(map(str, options.deny_from)) or None,
        "max_visitors": terms.max_visitors,
        "max_per_source": terms.rules.max_per_source,
        "visitor_rate": str(terms.rules.rate) if terms.rules.rate else None,
        "bandwidth": terms.bandwidth,
        "quota": terms.quota,
        "age": int(tunnel.age),
        "visitors": len(tunnel.visitors),
        "waiting": tunnel.waiting,
        "parked": tunnel.parked,
        "served": tunnel.served,
        "refused": tunnel.refusals.total(),
        "up": up,
        "down": down,
    }
