"""URIs and addresses: parsed, printed, compared. Pure.

    tcp://relay.example.org:8010      an endpoint: scheme, host, port
    tcp://[2001:db8::1]:8010          IPv6 hosts in brackets (RFC 3986 §3.2.2)
    tls://host:8010/KEY               the same with a key, which a hidden server must present
    webmuxs://host:7012/KEY           the same for one of several tunnels behind a shared port
    egtp://host:7020/NODE-ID          the same, with the id of the node that the hidden server is to talk to
    ssh://KEY@host:7022               the same, with the key as the user name
    https://blog.example.org/api      a web address: without the port that its scheme implies, perhaps with a path
    private://shell@AAECAwQFBgc...    a private tunnel: its name, and the id of its node, see `net.address`
    8000   host:8000   unix:/path     a target: where a local server listens

Two endpoints are equal if they print the same: parsing puts scheme and host in lower case.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tunneld.errors import UsageError

MAX_PORT = 65535
KEY_IN_PATH_SCHEMES = ("tcp", "tls", "webmux", "webmuxs", "egtp")
"""Schemes whose URIs may have a key after the port."""
KEY_AS_USER_SCHEMES = ("ssh",)
"""Schemes whose URIs may have a key as the user name."""
_ENDPOINT_PATTERN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://((?P<user>[\w-]+)@)?(?P<authority>[^/?#@]+)/?(?P<key>[\w-]*)",
    re.IGNORECASE | re.ASCII,
)
WEB_PORTS = {"http": 80, "https": 443}
"""Schemes of web addresses, and the port that each implies."""
_WEB_PATTERN = re.compile(
    r"(?P<scheme>https?)://(?P<authority>[^/?#@]+)(?P<path>(?:/[^?#\s]*)?)", re.IGNORECASE | re.ASCII
)
PRIVATE_SCHEME = "private"
"""Scheme of the public addresses of private tunnels. They have no host and no port."""
_PRIVATE_PATTERN = re.compile(r"private://(?P<name>[\w.-]+)@(?P<node>[\w-]+)/?", re.ASCII)
_RELAY_PATTERN = re.compile(
    r"((?P<scheme>tcp|tls)://)?(?P<host>\[[^\]]*\]|[^:/?#@]+)(:(?P<port>[0-9]+))?/?", re.IGNORECASE | re.ASCII
)
_HOST_PATTERN = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?", re.IGNORECASE)
_PORT_RANGE = re.compile(r"(?P<host>(?:(?:\[[^\]]*\]|[^:]*):)?)(?P<first>[0-9]+)-(?P<last>[0-9]+)")
_HOST_PORT_PATTERN = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*):(?P<port>[0-9]+)")

CONTROL_PORT = 7010
"""The default port of the control protocol."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Peer = tuple[str, int] | tuple[str, int, int, int]
"""The address of a TCP socket's peer, as `accept` returns it: host and port, for IPv6 with flow label and scope."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address to connect to, as a URI: `str()` prints what `parse()` reads."""

    scheme: str
    host: str
    port: int
    key: str = ""
    path: str = ""  # of a web address, without a `/` at the end; of a private tunnel the id, and `host` is its name

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Parse `scheme://host:port`, `scheme://host:port/KEY`, `scheme://KEY@host:port` or a web address.

        Raises `UsageError`, which names the text and the reason.
        """
        if (web := _WEB_PATTERN.fullmatch(text)) is not None:
            return cls._parse_web(web["scheme"].lower(), web["authority"], web["path"])
        if (private := _PRIVATE_PATTERN.fullmatch(text)) is not None:
            return cls(PRIVATE_SCHEME, private["name"], 0, path=private["node"])
        match = _ENDPOINT_PATTERN.fullmatch(text)
        if match is None:
            raise UsageError(f"invalid URI {text!r}: expected scheme://host:port")
        scheme = match["scheme"].lower()
        if match["key"] and scheme not in KEY_IN_PATH_SCHEMES:
            raise UsageError(
                f"invalid URI {text!r}: only {', '.join(KEY_IN_PATH_SCHEMES)} URIs have a key after the port"
            )
        if match["user"] and scheme not in KEY_AS_USER_SCHEMES:
            raise UsageError(f"invalid URI {text!r}: only ssh URIs have a key before the host")
        host, port = parse_host_port(match["authority"])
        return cls(scheme, host, port, match["key"] or match["user"] or "")

    @classmethod
    def _parse_web(cls, scheme: str, authority: str, path: str) -> Endpoint:
        with_port = authority if _HOST_PORT_PATTERN.fullmatch(authority) else f"{authority}:{WEB_PORTS[scheme]}"
        host, port = parse_host_port(with_port)
        return cls(scheme, host, port, path=path.rstrip("/"))

    @property
    def authority(self) -> str:
        """`host:port`, with brackets around an IPv6 host."""
        return join_host_port(self.host, self.port)

    @property
    def web_authority(self) -> str:
        """The same as the Host field of a request has it: without the port that the scheme implies."""
        return self.authority if WEB_PORTS.get(self.scheme) != self.port else self.authority.rpartition(":")[0]

    @property
    def without_key(self) -> str:
        """The URI for a log, without the secret: a peer that knows the key can act as the hidden server."""
        return str(replace(self, key="...")) if self.key else str(self)

    def __str__(self) -> str:
        if self.scheme in WEB_PORTS:
            return f"{self.scheme}://{self.web_authority}{self.path or '/'}"
        if self.scheme == PRIVATE_SCHEME:
            return f"{self.scheme}://{self.host}@{self.path}"
        authority = join_host_port(self.host, self.port)
        if not self.key:
            return f"{self.scheme}://{authority}"
        if self.scheme in KEY_AS_USER_SCHEMES:
            return f"{self.scheme}://{self.key}@{authority}"
        return f"{self.scheme}://{authority}/{self.key}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a local server listens: a TCP host and port, or the path of a Unix socket; or `count` of them, at as many
    ports in a row.
    """

    host: str = ""
    port: int = 0
    path: str = ""
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse `PORT`, `HOST:PORT` or `unix:/PATH`; a port may be a range, `5000-5010`. Raises `UsageError`."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path:
                raise UsageError(f"invalid local server {text!r}: the path is missing")
            return cls(path=path)
        if (found := _PORT_RANGE.fullmatch(text)) is not None:
            first = cls.parse(found["host"] + found["first"])
            last = parse_port(found["last"], text, lowest=1)
            if last < first.port:
                raise UsageError(f"invalid local server {text!r}: the last port is below the first")
            return cls(first.host, first.port, count=last - first.port + 1)
        if text.isascii() and text.isdigit():
            return cls("127.0.0.1", parse_port(text, text, lowest=1))
        if not _HOST_PORT_PATTERN.fullmatch(text):
            hint = _ipv6_hint(text, with_port=True) or "expected PORT, HOST:PORT or unix:PATH"
            raise UsageError(f"invalid local server {text!r}: {hint}")
        host, port = parse_host_port(text, lowest=1)
        return cls(host, port)

    def __str__(self) -> str:
        last = f"-{self.port + self.count - 1}" if self.count > 1 else ""
        return f"unix:{self.path}" if self.path else join_host_port(self.host, self.port) + last

    @property
    def each(self) -> Sequence[Target]:
        """The local servers, each with one port."""
        return [self] if self.count == 1 else [Target(self.host, self.port + index) for index in range(self.count)]


def parse_relay(text: str, *, tls: bool = False) -> Endpoint:
    """Parse the address of a control port: `HOST` or `HOST:PORT`, optionally with `tcp://` or `tls://` in front.

    With `tls` the scheme is `tls` in any case. Raises `UsageError`, which never shows the key of a server URI.
    """
    match = _RELAY_PATTERN.fullmatch(text)
    if match is None:
        uri = _ENDPOINT_PATTERN.fullmatch(text)
        if uri is not None and (uri["key"] or uri["user"]):
            raise UsageError(
                "invalid relay address: this is the server URI of a tunnel; pass HOST or HOST:PORT of the relay"
            )
        hint = _ipv6_hint(text) or "expected HOST or HOST:PORT, optionally after tcp:// or tls://"
        raise UsageError(f"invalid relay address {text!r}: {hint}")
    scheme = "tls" if tls else (match["scheme"] or "tcp").lower()
    port = match["port"] or str(CONTROL_PORT)
    return Endpoint(scheme, parse_host(match["host"], text), parse_port(port, text, lowest=1))


def parse_host_port(text: str, *, lowest: int = 0) -> tuple[str, int]:
    """Parse `host:port` or `[v6]:port` with a port in `lowest`..65535. Raises `UsageError`."""
    match = _HOST_PORT_PATTERN.fullmatch(text)
    if match is None:
        raise UsageError(f"invalid address {text!r}: {_ipv6_hint(text, with_port=True) or 'expected host:port'}")
    return parse_host(match["host"], text), parse_port(match["port"], text, lowest=lowest)


def _ipv6_hint(text: str, *, with_port: bool = False) -> str:
    """How to write an IPv6 address that was given without brackets; empty if the text is none. It may have a scheme,
    and its last group may have been meant as a port, which `with_port` says is required.
    """
    scheme, separator, address = text.rpartition("://")
    if not _is_ipv6(address):
        return ""
    start, _, last = address.rpartition(":")
    forms = [] if with_port else [f"[{address}]"]
    if _is_ipv6(start) and last.isdigit():
        forms.append(f"[{start}]:{last}")
    elif with_port:
        forms.append(f"[{address}]:PORT")
    return f"an IPv6 address needs brackets: {' or '.join(f'{scheme}{separator}{form}' for form in forms)}"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def parse_host(text: str, whole: str | None = None) -> str:
    """Check a host name or address, part of the text `whole`, and return it in lower case without brackets.

    Raises `UsageError`.
    """
    whole = text if whole is None else whole
    if text.startswith("["):
        try:
            return ipaddress.IPv6Address(text.strip("[]")).compressed
        except ValueError:
            raise UsageError(f"invalid IPv6 address in {whole!r}: {text}") from None
    if not _HOST_PATTERN.fullmatch(text):
        raise UsageError(f"invalid host name or address in {whole!r}: {text!r}")
    return text.lower()


def parse_port(text: str, whole: str, *, lowest: int = 0) -> int:
    """Parse a port number in `lowest`..65535, part of the text `whole`. Raises `UsageError`."""
    if (
        not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_PORT)))
        or not lowest <= int(text) <= MAX_PORT
    ):
        raise UsageError(f"port out of range in {whole!r}: {text} is not between {lowest} and {MAX_PORT}")
    return int(text)


def join_host_port(host: str, port: int) -> str:
    """Print `host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_peer(address: Any) -> str:
    """Print what `getpeername` or `accept` returned: `host:port`, `[v6]:port`, or `unix`."""
    if isinstance(address, tuple) and len(address) >= 2:
        return join_host_port(str(address[0]), int(address[1]))
    return "unix"


def parse_network(text: str) -> Network:
    """Parse an address or a network: `192.0.2.7`, `192.0.2.0/24`, `2001:db8::/32`. Raises `UsageError`."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise UsageError(f"not an address or a network: {text!r}") from None


def contains(network: Network, peer: Peer) -> bool:
    """Whether a peer address, as `accept` returned it, is in the network."""
    return _contains(network, peer[0])


@lru_cache(maxsize=1024)  # a hidden server connects from one address thousands of times; parsing takes 10 µs
def _contains(network: Network, host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]) in network


def is_wildcard(host: str) -> bool:
    """Whether a bind host means every address of the machine."""
    return host in {"", "0.0.0.0", "::"}


def is_loopback(host: str) -> bool:
    """Whether a host is this machine only. A name other than localhost is not resolved and counts as public."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
