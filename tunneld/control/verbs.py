"""The verbs of the control protocol: one function each, in the order of the table in `commands`.

Each function gets the daemon, the request and its caller, and returns a `Reply` or raises a `TunneldError`. To a
caller, tunnels of other credentials do not exist, unless it is an admin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import trio

from tunneld.config.keys import keys, value
from tunneld.config.schema import Settings
from tunneld.config.wording import literal
from tunneld.directory.reply import DescribedItems, Reply
from tunneld.directory.requester import Requester
from tunneld.directory.reservations import ReservationView
from tunneld.directory.service import TunnelService
from tunneld.directory.sharing import find_site
from tunneld.egtp.passing import PassingService
from tunneld.errors import CertificateError, ShortageError, UsageError, reason_of
from tunneld.net.address import Port, format_ports
from tunneld.net.endpoint import format_peer
from tunneld.policy.access import Role
from tunneld.policy.admission import RefusalKind
from tunneld.policy.options import ANYWHERE, TunnelOptions, parse_seconds
from tunneld.policy.units import count
from tunneld.sites.site import PortOrders
from tunneld.tls.store import CertificateStore
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.lines import ControlRequest, Item

MAX_TRIM = 1_000_000
"""Idle server connections: far above any `tunnels.max_parked`."""


class CertificateOrders(PortOrders, Protocol):
    """The certificates for host names, as `acme.manager` keeps them."""

    def certificates(self) -> Sequence[Item]:
        """One item for each certificate."""

    def problems(self) -> Sequence[str]:
        """Which host names have no valid certificate, in a few words each."""

    async def renew(self, name: str) -> object:
        """Order a new certificate now. Raises `CertificateError` or `UsageError`."""

    async def trial(self, name: str, on_step: Callable[[str], None]) -> None:
        """Order a certificate that is thrown away. Raises `CertificateError` or `UsageError`."""


class DaemonControl(Protocol):
    """What the verbs need of the daemon."""

    @property
    def service(self) -> TunnelService:
        """The directory of tunnels."""

    @property
    def settings(self) -> Settings:
        """The settings in force."""

    def status(self) -> Item:
        """The item of `status`."""

    @property
    def mail(self) -> PassingService | None:
        """The messages of EGTP nodes; None on a system that has no such nodes."""

    def reload(self) -> Sequence[Item]:
        """Read the configuration file again; returns one item per changed key. On `ConfigError` nothing changes."""

    def penalties(self) -> Sequence[Item]:
        """The penalties in force after failed logins."""

    def pardon(self, address: str) -> bool:
        """Forget the failed logins from an address; returns whether there were any. Raises `UsageError`."""

    def shutdown(self, *, drain: bool) -> None:
        """Stop the process; with `drain`, connections may finish first."""

    @property
    def certificates(self) -> CertificateStore:
        """The certificates of all ports."""

    @property
    def certificate_orders(self) -> CertificateOrders:
        """The certificates for host names."""

    async def restart(self) -> None:
        """Begin to replace the process by the installed one. Raises `ConfigError`, `DrainingError` or `UsageError`."""


async def open_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Open a tunnel; the text is its server URI. With `described`, an item has its id and its client URI."""
    backend, *flags = request.args or ("tcp",)
    if flags not in ([], ["described"]):
        raise UsageError(f"unrecognized argument {flags[0]!r}; usage: openTunnel [backend [described]] [key=value ...]")
    options = TunnelOptions.parse(request.options)
    tunnel = await daemon.service.open_tunnel(backend, options, caller)
    several = {"ports": ports} if (ports := _several_ports(tunnel)) is not None else {}
    items: list[Item] = [{"client": str(tunnel.client_uri), "id": tunnel.id, **several}] if flags else []
    return Reply(text=str(tunnel.server_uri), items=items)


async def get_tunnel_address(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """The text is the client URI of the tunnel with this server URI."""
    return Reply(text=str(await daemon.service.get_tunnel_address(request.args[0], caller.known_grant)))


async def list_tunnels(daemon: DaemonControl, _request: ControlRequest, caller: Requester) -> Reply:
    """One item for each open tunnel that the caller may see, oldest first. One that closes while the reply is produced
    has the phase `closed`.
    """
    tunnels = daemon.service.tunnels(caller.known_grant)
    return Reply(text=count(len(tunnels), "tunnel"), items=DescribedItems(tunnels, description_for(caller)))


async def show_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """One item for the tunnel, then one for each visitor."""
    tunnel = await daemon.service.find_local(request.args[0], caller.known_grant)
    now = trio.current_time()
    visitors: list[Item] = [
        {
            "visitor": format_peer(visitor.peer),
            "host": str(visitor.host) if visitor.host is not None else None,
            "credential": visitor.credential,
            "age": int(now - visitor.since),
            "up": relay.up,
            "down": relay.down,
        }
        for relay, visitor in tunnel.visitors.relays.items()
    ]
    return Reply(text=count(len(visitors), "visitor"), items=[description_for(caller)(tunnel), *visitors])


async def close_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Close a tunnel now; without `keep`, drop its reservation."""
    reference, *flags = request.args
    if flags not in ([], ["keep"]):
        raise UsageError(f"unrecognized argument {flags[0]!r}; usage: close URI|ID [keep]")
    tunnel = await daemon.service.close(reference, caller.known_grant, keep=bool(flags))
    return Reply(text=f"closed {tunnel.id}")


async def list_reservations(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """One item for each reservation that the caller may see, or for each with this address or name."""
    addresses, grant = daemon.service.reservations, caller.known_grant
    found = addresses.find(request.args[0], grant) if request.args else addresses.kept(grant)
    return Reply(text=count(len(found), "reservation"), items=DescribedItems(found, describe_reservation))


async def release_reservation(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Drop the reservation of a tunnel that is not open."""
    record = await daemon.service.reservations.release(request.args[0], caller.known_grant)
    return Reply(text=f"released {record.public} of {record.holder.name}")


async def drain_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Accept no new visitors; the tunnel closes when its last visitor leaves."""
    tunnel = await daemon.service.drain_one(request.args[0], caller.known_grant)
    return Reply(text=f"draining {tunnel.id}, {count(len(tunnel.visitors), 'visitor')} left")


async def join_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Let the agent that sent this request serve the tunnel, from the address of the request."""
    tunnel = await daemon.service.join(request.args[0], caller)
    return Reply(text=f"joined {tunnel.id}")


async def leave_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """The agent that sent this request stops serving the tunnel; the last agent drains it."""
    tunnel = await daemon.service.find_local(request.args[0], caller.known_grant)
    if tunnel.dismiss(caller.owner):
        return Reply(text=f"draining {tunnel.id}, {count(len(tunnel.visitors), 'visitor')} left")
    return Reply(text=f"left {tunnel.id}; remaining agents: {len(tunnel.agents)}")


async def trim_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Close idle server connections beyond a number to keep."""
    tunnel = await daemon.service.find_local(request.args[0], caller.known_grant)
    keep = request.args[1]
    if not (keep.isascii() and keep.isdigit() and len(keep) <= len(str(MAX_TRIM))):
        raise UsageError(f"COUNT must be a number of server connections to keep, not {keep!r}")
    return Reply(text=f"closed {count(tunnel.trim(int(keep), caller.host), 'idle server connection')} of {tunnel.id}")


async def share_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Return a link to a protected host name that lasts for some time, or revoke all links to it."""
    reference, word = request.args
    site = await find_site(daemon.service, reference, caller.known_grant)
    try:
        if word == "revoke":
            await site.revoke()
            return Reply(text=f"revoked all links to {site.name}")
        return Reply(text=await site.share(parse_seconds(word)))
    except ValueError as error:
        raise UsageError(f"{word!r} is {error}; usage: share NAME|URI|ID SECONDS|revoke") from None
    except OSError as error:
        raise ShortageError(f"could not store the state of shared links: {reason_of(error)}") from None


async def status(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """The process in one item."""
    return Reply(items=[daemon.status()])


async def settings(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each key that begins with the argument, with the value in force. Credentials are left out."""
    prefix = request.args[0].lower() if request.args else ""
    paths = [key.path for key in keys() if not key.repeated and f"{key.path}.".startswith(prefix)]
    if not paths:
        raise UsageError(f"no key begins with {prefix!r}; see tunnel.toml(5)")
    shown = ((path, value(daemon.settings, path)) for path in paths)
    items: list[Item] = [{"key": path, "value": None if found is None else literal(found)} for path, found in shown]
    return Reply(text=count(len(items), "key"), items=items)


async def list_penalties(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each penalty in force: of an address, or of one name at an address."""
    items = daemon.penalties()
    return Reply(text=count(len(items), "penalty", "penalties"), items=items)


async def pardon(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Forget the failed logins from an address, and so lift its penalties and those of names there."""
    (address,) = request.args
    had_failures = daemon.pardon(address)
    return Reply(text=f"pardoned {address}" if had_failures else f"no failed login from {address} is remembered")


async def list_certificates(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each certificate for host names, and for each name that waits for one."""
    items = daemon.certificate_orders.certificates()
    return Reply(text=count(len(items), "certificate"), items=items)


async def renew_certificate(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Order a new certificate for a host name now, and wait for it."""
    (name,) = request.args
    await daemon.certificate_orders.renew(name.lower())
    return Reply(text=f"renewed the certificate for {name.lower()}")


async def try_certificate(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Order a certificate that is thrown away; one item for each step, the last one may have failed."""
    (name,) = request.args
    steps: list[Item] = []
    try:
        await daemon.certificate_orders.trial(name.lower(), lambda step: steps.append({"step": step, "failed": False}))
    except CertificateError as error:
        steps.append({"step": str(error), "failed": True})
    return Reply(text="failed" if steps and steps[-1]["failed"] else "ok", items=steps)


async def reload(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """Read the configuration file again; one item per changed key."""
    items = daemon.reload()
    return Reply(text=f"{count(len(items), 'key')} changed", items=items)


async def shut_down(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Stop the daemon, now or after a drain."""
    if request.args not in {(), ("drain",)}:
        raise UsageError(f"unrecognized argument {request.args[0]!r}; usage: shutdown [drain]")
    drain = bool(request.args)
    daemon.shutdown(drain=drain)
    return Reply(text="draining, then stopping" if drain else "stopping")


async def restart(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """Replace the daemon with the installed program; tunnels and connections are kept as far as possible."""
    await daemon.restart()
    return Reply(text=f"restarting with {count(len(daemon.service.tunnels()), 'tunnel')}")


def describe_reservation(kept: ReservationView) -> Item:
    """The item of a reservation. The server URI contains its key, so only its port is shown."""
    record = kept.record
    return {
        "name": record.holder.name,
        "owner": record.holder.credential or record.holder.host,
        "backend": record.backend,
        "address": ",".join(map(str, record.addresses)),
        "client_port": record.client_port,
        "server_port": record.server.port,
        "tunnel": kept.tunnel,
        "left": None if kept.left is None else int(kept.left),
    }


def description_for(caller: Requester) -> Callable[[Tunnel], Item]:
    """What describes tunnels to this caller: a viewer does not see the keys, with which it could pose as the server."""
    if caller.known_grant.role is not Role.VIEWER:
        return describe_tunnel
    return lambda tunnel: {**describe_tunnel(tunnel), "server": str(tunnel.server_uri.without_key)}


def describe_tunnel(tunnel: Tunnel) -> Item:
    """The item of a tunnel in `list` and `show`; times in seconds, sizes in bytes."""
    spec, options, limits = tunnel.spec, tunnel.spec.options, tunnel.limits
    up, down = tunnel.octets
    return {
        "id": tunnel.id,
        "name": options.name or None,
        "backend": spec.backend,
        "phase": tunnel.phase.value,
        "server": str(tunnel.server_uri),
        "client": str(tunnel.client_uri),
        "url": _url(tunnel),
        "ports": _several_ports(tunnel),
        "certificate": _certificate_problem(tunnel) or None,
        "host": ",".join(map(str, spec.names)) or None,
        "private": str(spec.private) if spec.private is not None else None,
        "host_header": options.host_header or None,
        "plain_http": options.plain_http if spec.names and options.plain_http != "redirect" else None,
        "tls": options.tls if spec.names and options.tls != "terminate" else None,
        "owner": spec.owner,
        "agents": len(tunnel.agents) if options.share else None,
        "secure": None if options.secure == "no" else options.secure,
        "server_from": ANYWHERE if tunnel.agents.networks is None else ",".join(map(str, tunnel.agents.networks)),
        "persist": options.persist,
        "allow_from": ",".join(map(str, options.allow_from)) or None,
        "deny_from": ",".join(map(str, options.deny_from)) or None,
        "max_visitors": limits.max_visitors,
        "max_per_source": limits.rules.max_per_source,
        "visitor_rate": str(limits.rules.rate) if limits.rules.rate else None,
        "bandwidth": limits.bandwidth,
        "quota": limits.quota,
        "age": int(tunnel.age),
        "visitors": len(tunnel.visitors),
        "waiting": tunnel.waiting,
        "parked": tunnel.parked,
        "served": tunnel.served,
        "refused": tunnel.refusals.total(),
        "refusals": _by_kind(tunnel.refusals),
        "up": up,
        "down": down,
    }


def _url(tunnel: Tunnel) -> str | None:
    """The public address as a browser needs it, where its agent has said what visitors speak there."""
    scheme, client = tunnel.spec.options.scheme, tunnel.client_uri
    is_one = scheme is not None and client.scheme == "tcp" and _several_ports(tunnel) is None
    return f"{scheme}://{client.authority}/" if is_one else None


def _several_ports(tunnel: Tunnel) -> str | None:
    """The public ports, as `format_ports` prints them, if there are several."""
    ports = [address.number for address in tunnel.addresses if isinstance(address, Port)]
    return format_ports(ports) if len(ports) > 1 else None


def _by_kind(refusals: Mapping[RefusalKind, int]) -> str | None:
    """`rate:12,address:3`, the most frequent kind first; None if there are none."""
    counted = sorted(((number, kind.value) for kind, number in refusals.items() if number), reverse=True)
    return ",".join(f"{kind}:{number}" for number, kind in counted) or None


def _certificate_problem(tunnel: Tunnel) -> str:
    """Why visitors of a host name of this tunnel cannot come with https, although they should."""
    names = tunnel.spec.services.names
    if names is None or tunnel.spec.options.tls == "pass":
        return ""
    return next((reason for name in tunnel.spec.names if (reason := names.why_uncertified(name.name))), "")
