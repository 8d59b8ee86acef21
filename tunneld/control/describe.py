"""What `list`, `show` and `reservations` tell of a tunnel and of a reservation: one item each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunneld.directory.requester import Requester
from tunneld.directory.reservations import ReservationView
from tunneld.net.address import Port, format_ports
from tunneld.policy.access import Role
from tunneld.policy.admission import RefusalKind
from tunneld.policy.options import ANYWHERE
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.lines import Item


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
        "ports": several_ports(tunnel),
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
    is_one = scheme is not None and client.scheme == "tcp" and several_ports(tunnel) is None
    return f"{scheme}://{client.authority}/" if is_one else None


def several_ports(tunnel: Tunnel) -> str | None:
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
