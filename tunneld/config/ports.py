"""The ports that a configuration asks for, and which of them it asks for twice. Pure.

Two listeners collide if they have the same port on the same address, or one of them has all addresses: the daemon
cannot start then. A service whose port is one for tunnels, too, is only dubious. The daemon opens it first, and tunnels
get other ports; but a reload that moves the service may find a tunnel there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from tunneld.config.schema import Settings

BoundHost = ipaddress.IPv4Address | ipaddress.IPv6Address | str
"""An address, or a name that is not resolved."""
ALL = ipaddress.IPv6Address("::")
"""All addresses: it is bound for both families."""
ALL_IPV4 = ipaddress.IPv4Address("0.0.0.0")
TUNNEL_PORTS = "tunnels.ports"
LOOPBACK_NAMES = {"localhost": ("127.0.0.1", "::1")}

_HEADER = re.compile(r"\s*\[+\s*([^\]#]+?)\s*\]")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


@dataclass(frozen=True, slots=True)
class RequestedPorts:
    """The ports of one listener, or of all tunnels: the key that sets them, and the host to bind."""

    key: str
    host: str
    ports: range

    def __str__(self) -> str:
        return f"{self.ports[0]}-{self.ports[-1]}" if len(self.ports) > 1 else str(self.ports[0])


def requested_ports(settings: Settings) -> list[RequestedPorts]:
    """The ports of all enabled services and of tunnels, without those that the system may choose."""
    control, web, webmux, ssh, egtp, tunnels = (
        settings.control,
        settings.http,
        settings.webmux,
        settings.ssh,
        settings.egtp,
        settings.tunnels,
    )
    services = [
        ("control.port", control.host, control.port),
        *([("http.port", web.host, web.port)] if web.enabled else []),
        *(
            [("webmux.port", tunnels.host if webmux.host is None else webmux.host, webmux.port)]
            if webmux.enabled
            else []
        ),
        *([("ssh.port", tunnels.host if ssh.host is None else ssh.host, ssh.port)] if ssh.enabled else []),
        *([("egtp.port", tunnels.host if egtp.host is None else egtp.host, egtp.port)] if egtp.enabled else []),
    ]
    found = [RequestedPorts(key, host, range(port, port + 1)) for key, host, port in services if port]
    if tunnels.port_range[0]:
        found.append(RequestedPorts(TUNNEL_PORTS, tunnels.host, tunnels.port_range))
    return found


def collisions(settings: Settings, text: str = "") -> Iterator[str]:
    """One sentence for each two services that ask for the same port. `text` is the file, for the numbers of lines."""
    lines = key_lines(text)
    for one, other in _overlapping(settings):
        if other.key != TUNNEL_PORTS:
            first, second = (f"{each.key} ({_position(each.key, lines)})" for each in (one, other))
            yield f"{first} and {second} are both {one} on the same address; change one of them"


def services_among_tunnels(settings: Settings) -> Iterator[str]:
    """One sentence for each service whose port is one of the ports for tunnels."""
    for one, other in _overlapping(settings):
        if other.key == TUNNEL_PORTS:
            tunnels = f"({TUNNEL_PORTS} = {other})"
            yield f"{one.key} is {one}, which is one of the ports for tunnels {tunnels}; change one of them"


def _overlapping(settings: Settings) -> Iterator[tuple[RequestedPorts, RequestedPorts]]:
    for one, other in combinations(requested_ports(settings), 2):
        if one.ports[0] in other.ports and _share_an_address(one.host, other.host):
            yield one, other


def key_lines(text: str) -> dict[str, int]:
    """The line of each key in the text of a file, counted from 1; a key of an inline table is not in it."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = f"{_plain(header[1])}."
        elif key := _KEY.match(line):
            found.setdefault(table + _plain(key[1]), number)
    return found


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def _position(key: str, lines: dict[str, int]) -> str:
    """Where the key is set: in a line of its own, in that of an inline table, or nowhere."""
    number = lines.get(key) or lines.get(key.partition(".")[0])
    return "the default" if number is None else f"line {number}"


def _share_an_address(one: str, other: str) -> bool:
    """Whether sockets bound to these two hosts can get the same connection. A name other than localhost is not
    resolved: it equals itself, and is part of all addresses.
    """
    return any(_overlap(mine, yours) for mine in _addresses(one) for yours in _addresses(other))


def _addresses(host: str) -> list[BoundHost]:
    return [_parsed(each) for each in LOOPBACK_NAMES.get(host, (host or "::",))]


def _parsed(host: str) -> BoundHost:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return getattr(address, "ipv4_mapped", None) or address


def _overlap(one: BoundHost, other: BoundHost) -> bool:
    if one == other or ALL in (one, other):
        return True
    return ALL_IPV4 in (one, other) and not any(isinstance(each, ipaddress.IPv6Address) for each in (one, other))
