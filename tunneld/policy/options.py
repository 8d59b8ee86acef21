"""The options of openTunnel: `key=value` words parsed into one valid value. Pure.

`OPTIONS` is the table of them, read by the parser, `help openTunnel`, the command line and the check of the manual.
The parsers are public: the command line and the agent read the same kinds of values with them.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tunneld.errors import UsageError
from tunneld.net.address import parse_host_name
from tunneld.net.endpoint import MAX_PORT, Network, parse_network
from tunneld.net.node_id import NodeId
from tunneld.policy.logins import Login, parse_auth
from tunneld.policy.networks import parse_networks
from tunneld.policy.private import PrivateClaim
from tunneld.policy.rates import Rate
from tunneld.policy.site_rules import MAX_HSTS, AuthUrl, parse_field_names

MAX_SECONDS = 365 * 24 * 3600.0
"""The longest time of an option: a year is far beyond any use, and small enough for every computation with clocks."""

Anywhere = Literal["any"]
ANYWHERE: Anywhere = "any"
Secure = Literal["yes", "key", "no"]
Tls = Literal["terminate", "pass"]
PlainHttp = Literal["redirect", "allow", "refuse"]
MAX_COUNT = 1_000_000
"""Visitors: as [tunnels] accepts for the same keys, and far beyond the descriptors of a process."""
MAX_BYTES = 10**15
"""The largest bandwidth or quota: 100 MB/s for four months."""
MAX_TUNNEL_PORTS = 100
"""Public ports of one tunnel. Each is a listening socket of the relay; passive FTP, games and SIP use some ten."""
BYTE_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
ANY_HOST = "any"
"""Stands for a random host name under the relay's domain."""
MAX_HOSTS = 16
"""Host names of one tunnel: what fits a line of the control protocol."""
MAX_NAME = 64
"""Characters in a tunnel's name: fits a column of a table, and with one less a DNS label (63)."""


@dataclass(frozen=True, slots=True)
class TunnelOptions:
    """The options of one openTunnel request. None means: as the relay is configured. Times are in seconds."""

    persist: bool = False
    secure: Secure = "no"  # "yes": TLS and a key; "key": a key alone
    server_from: Network | Anywhere | None = None  # None: the requester, or any with a key in TLS
    ttl: float | None = None
    idle_timeout: float | None = None
    open_timeout: float | None = None
    pairing_timeout: float | None = None
    linger: float | None = None
    proxy_protocol: str | None = None
    client_port: int | None = None
    bind: str = ""  # the address of the relay at which its public ports are; empty: as the relay listens
    port_count: int = 1  # public ports, from `client_port` on where that is given
    host: tuple[str, ...] = ()  # names as requested; the directory completes them
    tls: Tls = "terminate"  # of host names: where TLS ends
    plain_http: PlainHttp = "redirect"  # what happens to plain requests for host names that have a certificate
    host_header: str = ""  # the host that the local server expects; empty: the public one
    auth: tuple[Login | str, ...] = ()  # of host names: who may see it; empty: every visitor
    forward_auth: str = ""  # the URL of an authentication server that decides
    forward_auth_fields: tuple[str, ...] = ()  # of its answer, for the local server
    hsts: int = 0  # seconds
    name: str = ""
    allow_from: tuple[Network, ...] = ()
    deny_from: tuple[Network, ...] = ()
    max_visitors: int | None = None
    max_per_source: int | None = None
    visitor_rate: Rate | None = None
    bandwidth: int | None = None  # bytes per second
    quota: int | None = None  # bytes
    hide_visitor: bool = False
    scheme: Literal["http", "https"] | None = None  # what clients speak at its port, for the address that is shown
    node: str = ""  # the id of the EGTP node that serves the tunnel
    share: bool = False
    replace: bool = True
    private: PrivateClaim | None = None  # no public address; visitors ask for it, and its agent decides which enter

    @classmethod
    def parse(cls, words: Mapping[str, str]) -> TunnelOptions:
        """Read the options of a request. Raises `UsageError`, which names the option and what it accepts."""
        values: dict[str, Any] = {}
        for key, text in words.items():
            option = OPTIONS.get(key)
            if option is None:
                raise UsageError(f"unrecognized option {key!r}: openTunnel accepts {', '.join(OPTIONS)}")
            try:
                values[key] = option.read(text)
            except (UsageError, ValueError) as error:
                shown = repr(text) if key != "auth" else "..."  # verifiers are secrets, for logs at least
                raise UsageError(f"option {key}={shown}: {error}") from None
        options = cls(**values)
        options.check_ports()
        return options

    def check_ports(self) -> None:
        """Raise `UsageError` where several ports are requested that the tunnel cannot have."""
        if self.port_count > 1 and (self.host or self.private is not None):
            raise UsageError("option port_count is for tunnels with ports of their own; leave out host and private")
        if self.bind and (self.private is not None or (self.host and self.client_port is None)):
            raise UsageError("option bind is for tunnels with a port of their own; leave it out, or add client_port")
        if self.client_port is not None and self.client_port + self.port_count - 1 > MAX_PORT:
            raise UsageError(f"{self.port_count} ports from {self.client_port} on: the last port is {MAX_PORT}")

    @property
    def requested_ports(self) -> range:
        """The public ports that are requested; none where any will do."""
        return range(0) if self.client_port is None else range(self.client_port, self.client_port + self.port_count)

    def words(self) -> dict[str, str]:
        """The options that differ from their defaults, as `parse` reads them."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        words = {key: format_option(value) for key, (value, default) in values.items() if value != default}
        if self.auth:
            words["auth"] = ",".join(login if isinstance(login, str) else login.reveal() for login in self.auth)
        return words


def format_option(value: object) -> str:
    """Print the value of an option as a request has it, but no verifiers."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table: the parser of the value, what it accepts, what the option does, and where the agent has it.

    An option with a `group` is a flag of `tunnel expose` in that group, and a key of expose.toml.
    """

    read: Callable[[str], Any]  # raises `UsageError` or `ValueError`
    takes: str
    summary: str
    group: Literal["", "tunnel", "names", "visitors"] = ""
    flag: str = ""  # if it is not the key with dashes

    def flag_of(self, key: str) -> str:
        """The flag of `tunnel expose` for the option with this key."""
        return self.flag or f"--{key.replace('_', '-')}"


def parse_boolean(text: str) -> bool:
    """Read `yes` or `no`, and what JSON and shells have for them. Raises `ValueError`."""
    try:
        return {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}[text.lower()]
    except KeyError:
        raise ValueError("not yes or no") from None


def parse_seconds(text: str) -> float:
    """Read a time above 0 and up to `MAX_SECONDS`. Raises `ValueError`."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError("not a number of seconds") from None
    if not (math.isfinite(value) and 0 < value <= MAX_SECONDS):
        raise ValueError(f"not between 0 and {MAX_SECONDS:.0f} seconds")
    return value


def parse_client_port(text: str) -> int:
    """Read a port from 1 to 65535. Raises `ValueError`."""
    return _whole_number(text, "a port", MAX_PORT)


def parse_bind(text: str) -> str:
    """Read an address that is not a wildcard. Raises `ValueError`."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("not an IP address") from None
    if address.is_unspecified:
        raise ValueError("not the address of one interface")
    return str(address)


def parse_port_count(text: str) -> int:
    """Read a number of public ports. Raises `ValueError`."""
    return _whole_number(text, "a number of ports", MAX_TUNNEL_PORTS)


def parse_count(text: str, maximum: int = MAX_COUNT) -> int:
    """Read a count from 1 to `maximum`. Raises `ValueError`."""
    return _whole_number(text, "a number", maximum)


def parse_bytes(text: str) -> int:
    """Read a number of bytes from 1 to `MAX_BYTES`, with a decimal unit. Raises `ValueError`."""
    match = re.fullmatch(r"([0-9]{1,16})([kMGT]?)", text)
    count = int(match[1]) * BYTE_UNITS[match[2]] if match else 0
    if not 1 <= count <= MAX_BYTES:
        raise ValueError("not a number of bytes from 1 to 1000T; k, M, G and T stand for thousand, million and so on")
    return count


def parse_name(text: str) -> str:
    """Read a tunnel's name. Raises `ValueError`."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}", text):
        raise ValueError(f"not a name of at most {MAX_NAME} letters, digits, dots, dashes and underscores")
    return text


def parse_node(text: str) -> str:
    """Read a node id. Raises `UsageError`."""
    return str(NodeId.parse(text))


def parse_hosts(text: str) -> tuple[str, ...]:
    """Read host names, see `policy.names`. Raises `UsageError` or `ValueError`."""
    words = text.split(",")
    if len(words) > MAX_HOSTS:
        raise ValueError(f"more than {MAX_HOSTS} host names")
    for word in words:
        if word not in {ANY_HOST, "*"}:
            parse_host_name(word)
    return tuple(words)


def parse_host_header(text: str) -> str:
    """Read a host, perhaps with a port, or `local`. Raises `ValueError`."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}(:[0-9]{1,5})?", text):
        raise ValueError("not a host name, such as localhost:8000")
    return text


def parse_forward_auth(text: str) -> str:
    """Read the URL of an authentication server. Raises `UsageError`."""
    AuthUrl.parse(text)
    return text


def parse_hsts(text: str) -> int:
    """Read a number of seconds for Strict-Transport-Security. Raises `ValueError`."""
    return _whole_number(text, "a number of seconds", MAX_HSTS)


def parse_server_from(text: str) -> Network | Anywhere:
    """Read an address, a network or `any`. Raises `UsageError`."""
    return ANYWHERE if text.lower() == ANYWHERE else parse_network(text)


def _whole_number(text: str, noun: str, maximum: int) -> int:
    """ASCII digits alone: `int` would also accept signs, spaces, underscores and the digits of other scripts."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(maximum)) and 1 <= int(text) <= maximum):
        raise ValueError(f"not {noun} between 1 and {maximum}")
    return int(text)


def _secure(text: str) -> Secure:
    match text.lower():
        case "key":
            return "key"
        case _:
            return "yes" if parse_boolean(text) else "no"


def _plain_http(text: str) -> PlainHttp:
    match text.lower():
        case "redirect" | "allow" | "refuse" as value:
            return value
        case _:
            raise ValueError("not redirect, allow or refuse")


def _tls(text: str) -> Tls:
    match text.lower():
        case "terminate" | "pass" as value:
            return value
        case _:
            raise ValueError("not terminate or pass")


def _scheme(text: str) -> Literal["http", "https"]:
    match text.lower():
        case "http" | "https" as value:
            return value
        case _:
            raise ValueError("not http or https")


def _proxy_protocol(text: str) -> str:
    if text.lower() not in {"v1", "v2"}:
        raise ValueError("not v1 or v2")
    return text.lower()


TUNNEL: Literal["tunnel"] = "tunnel"
NAMES: Literal["names"] = "names"
VISITORS: Literal["visitors"] = "visitors"

OPTIONS: dict[str, Option] = {
    "persist": Option(parse_boolean, "yes|no", "stay open and serve any number of visitors, one per server connection"),
    "secure": Option(_secure, "yes|key|no", "server connections show a key: inside TLS (yes) or in plain text (key)"),
    "server_from": Option(parse_server_from, "ADDRESS|NETWORK|any", "where server connections may come from"),
    "ttl": Option(parse_seconds, "SECONDS", "close the tunnel after this time, even if it is in use", TUNNEL),
    "idle_timeout": Option(parse_seconds, "SECONDS", "close the tunnel after this time without data", TUNNEL),
    "open_timeout": Option(parse_seconds, "SECONDS", "close the tunnel after this time without a connection"),
    "pairing_timeout": Option(
        parse_seconds, "SECONDS", "how long a visitor waits at the relay for a free connection to the server", TUNNEL
    ),
    "linger": Option(parse_seconds, "SECONDS", "how long a connection may be idle after one direction has ended"),
    "proxy_protocol": Option(_proxy_protocol, "v1|v2", "send a PROXY protocol header with the visitor's address first"),
    "client_port": Option(
        parse_client_port,
        "PORT",
        "port to which clients connect; must be free and allowed by the relay",
        TUNNEL,
        "--port",
    ),
    "bind": Option(
        parse_bind,
        "ADDRESS",
        "address of the relay at which the public port is; the credential must allow it",
        TUNNEL,
    ),
    "port_count": Option(parse_port_count, "COUNT", "number of public ports, consecutive where possible"),
    "name": Option(
        parse_name, "NAME", "label for this tunnel; an agent restarted with the same label keeps its address", TUNNEL
    ),
    "private": Option(
        PrivateClaim.parse, "KEY.SIGNATURE", "no public address: only visitors that its agent admits, by their keys"
    ),
    "host": Option(
        parse_hosts,
        "NAME[,NAME...]|any",
        "host name under which visitors reach it: a label under the relay's domain, a name of your own, or any",
        NAMES,
    ),
    "plain_http": Option(
        _plain_http,
        "redirect|allow|refuse",
        "what to do with visitors that come without TLS (default: redirect)",
        NAMES,
    ),
    "tls": Option(
        _tls, "terminate|pass", "pass: the local server has the certificate, the relay only reads the name", NAMES
    ),
    "host_header": Option(
        parse_host_header, "local|NAME", "the host that the local server expects, in place of the public name", NAMES
    ),
    "auth": Option(
        parse_auth, "USER:VERIFIER[,...]|link", "passwords with which visitors of its host names get in, as verifiers"
    ),
    "forward_auth": Option(
        parse_forward_auth, "URL", "authentication server that decides about each request to its host names", NAMES
    ),
    "forward_auth_fields": Option(
        parse_field_names,
        "NAME[,NAME...]",
        "fields of its answer for the local server, such as Remote-User",
        NAMES,
    ),
    "hsts": Option(parse_hsts, "SECONDS", "tell browsers to use only https for its host names, for this time", NAMES),
    "allow_from": Option(parse_networks, "NETWORK[,NETWORK...]", "networks that visitors may connect from", VISITORS),
    "deny_from": Option(
        parse_networks, "NETWORK[,NETWORK...]", "networks that visitors may not connect from", VISITORS
    ),
    "max_visitors": Option(parse_count, "COUNT", "visitors at a time", VISITORS),
    "max_per_source": Option(parse_count, "COUNT", "visitors at a time from one IPv4 address or IPv6 /64", VISITORS),
    "visitor_rate": Option(Rate.parse, "N[/s|/m|/h]", "new visitors from one source per unit of time", VISITORS),
    "bandwidth": Option(
        parse_bytes, "BYTES[k|M|G|T]", "bytes per second, all visitors and both directions together", VISITORS
    ),
    "quota": Option(parse_bytes, "BYTES[k|M|G|T]", "close the tunnel when so many bytes have been relayed", VISITORS),
    "hide_visitor": Option(parse_boolean, "yes|no", "hide the address of visitors from the ssh client"),
    "scheme": Option(_scheme, "http|https", "what visitors speak at its port: list then shows a URL for browsers"),
    "node": Option(parse_node, "ID", "with egtp: the node, by the id of its key, that serves the tunnel"),
    "share": Option(parse_boolean, "yes|no", "serve the tunnel of this name together with other agents", TUNNEL),
    "replace": Option(parse_boolean, "yes|no", "no: fail while another agent serves the open tunnel of this name"),
}
