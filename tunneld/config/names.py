"""`[names]`: the host names of tunnels, and the HTTP and HTTPS ports that they share."""

from __future__ import annotations

import re
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from tunneld.config.certificates import name_server
from tunneld.config.paths import absolute_path
from tunneld.config.values import (
    DAY,
    KIB,
    MINUTE,
    Count,
    Folder,
    NetworkList,
    Seconds,
    SecondsOrNone,
    Table,
    ValidatedBool,
)
from tunneld.config.wording import literal
from tunneld.errors import UsageError
from tunneld.net.address import parse_host_name
from tunneld.net.endpoint import parse_host, parse_port
from tunneld.net.listeners import BindAddress
from tunneld.policy.limits import HttpLimits
from tunneld.policy.site_rules import AuthUrl

HTTP2 = "h2"
"""HTTP/2 in TLS (RFC 9113 §3.2)."""
_ADDRESS = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*):(?P<port>[0-9]+)")


def _listen_address(value: str) -> str:
    """Check `HOST:PORT` or `:PORT`; empty is off."""
    if not value:
        return value
    match = _ADDRESS.fullmatch(value)
    try:
        if match is None:
            raise UsageError("no port")
        host = parse_host(match["host"]) if match["host"] else ""
        port = parse_port(match["port"], value)
    except UsageError:
        raise ValueError(f'{literal(value)} is not a port to listen on; write ":443" or "192.0.2.1:443"') from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _domain(value: str) -> str:
    try:
        name = parse_host_name(value) if value else None
    except UsageError as error:
        raise ValueError(str(error)) from None
    if name is not None and (name.is_wildcard or name.path or "." not in name.name):
        raise ValueError(f"{literal(value)} is not a domain, such as t.example.org")
    return name.name if name is not None else ""


def _resolver(value: str) -> str:
    try:
        if value:
            ip_address(name_server(value)[0])
    except (UsageError, ValueError):
        raise ValueError(f"{literal(value)} is not the address of a DNS server, such as 192.0.2.53") from None
    return value


ListenAddress = Annotated[str, AfterValidator(_listen_address)]
HeadSize = Annotated[int, Field(ge=4 * KIB, le=256 * KIB)]


def _auth_url(value: str) -> str:
    try:
        AuthUrl.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


AuthUrls = Annotated[tuple[Annotated[str, AfterValidator(_auth_url)], ...], Field(strict=False)]


class NamesSettings(Table):
    """`[names]`: see tunnel.toml(5)."""

    domain: Annotated[str, AfterValidator(_domain)] = ""  # where chosen and random names live
    http: ListenAddress = ""  # off: ports below 1024 need a privilege
    https: ListenAddress = ""
    ssh: bool = True  # SSH clients may use the HTTPS port, too, where the ssh backend is enabled
    http2: bool = False  # a request costs several times more, and HTTP/1.1 serves every browser
    trusted_proxies: NetworkList = ()  # whose X-Forwarded-* are believed
    proxy_protocol: NetworkList = ()  # proxies that send a PROXY protocol header ahead of each connection
    max_connections: Count = 10_000  # of visitors on both ports: a descriptor and about 20 KiB each
    max_connections_per_source: Count = 1000  # a tenth of all: a hundred browsers behind one address
    head_timeout: Seconds = 10.0  # a TLS handshake, or a head, on a slow mobile network
    certificate_wait: SecondsOrNone = 20.0  # a handshake, for the first certificate of its name: a few seconds mostly
    max_certificate_waits: Count = 256  # handshakes that wait: a task and a descriptor each
    max_certificate_waits_per_name: Count = 16  # a browser opens up to six connections
    keep_alive_timeout: Seconds = 75.0  # between requests: as nginx has it, longer than browsers keep idle ones
    response_timeout: SecondsOrNone = 0.0  # until a response begins; 60 s would break long polls
    max_head: HeadSize = 32 * KIB  # of a request or response: four times what servers accept by default
    max_names: Count = 100_000  # of the relay: about 1 KiB each
    max_names_per_owner: Count = 64  # as for reservations
    forward_auth: AuthUrls = ()  # none: a tenant must not make the relay connect to addresses of its choice
    forward_auth_timeout: Seconds = 5.0  # a person waits
    forward_auth_cache: SecondsOrNone = 5.0  # the requests of one page; a logout takes effect after that
    access_log: Literal["off", "text", "json"] = "off"  # addresses of visitors are personal data
    access_log_file: Folder | None = None  # standard error, where the journal reads
    access_log_query: bool = False  # queries often have tokens
    custom_domains: ValidatedBool = False  # a record of a user decides what the relay serves, and gets certificates for
    custom_domains_cache: Seconds = 5 * MINUTE  # a record that was found: an agent that reconnects needs no look-up
    resolver: Annotated[str, AfterValidator(_resolver)] = ""  # the DNS servers of the system
    resolver_timeout: Seconds = 5.0  # a look-up through several servers, with a retry; the agent waits
    max_share: Seconds = 30.0 * DAY  # of a shared link: it is a password that nobody changes

    _absolute = field_validator("access_log_file")(absolute_path)

    @field_validator("https")
    @classmethod
    def _check_ports(cls, value: str, info: ValidationInfo) -> str:
        http = info.data.get("http", "")
        if value and http == value and not value.endswith(":0"):
            raise ValueError(f"{literal(value)} is names.http, too; HTTP and HTTPS need a port each")
        return value

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols that visitors may use in TLS (ALPN), by preference."""
        return (HTTP2, "http/1.1") if self.http2 else ("http/1.1",)

    @field_validator("custom_domains")
    @classmethod
    def _check_custom_domains(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("domain"):
            raise ValueError("is true, but domain is not set; it is a part of what users prove")
        if value and info.context is not None and find_spec("dns") is None:
            raise ValueError("needs the Python package dnspython, which is not installed; install tunneld[dns]")
        return value

    @property
    def resolver_address(self) -> tuple[str, int] | None:
        """The DNS server for look-ups; None: those of the system."""
        return name_server(self.resolver) if self.resolver else None

    @property
    def http_address(self) -> BindAddress | None:
        """Where the HTTP port listens; None: it does not."""
        return _bind_address(self.http)

    @property
    def https_address(self) -> BindAddress | None:
        """Where the HTTPS port listens; None: it does not."""
        return _bind_address(self.https)

    @property
    def challenges(self) -> tuple[str, ...]:
        """The challenges of certificate authorities that the ports answer."""
        return (*(["tls-alpn-01"] if self.https else []), *(["http-01"] if self.http else []))

    @property
    def limits(self) -> HttpLimits:
        """The limits of one connection."""
        return HttpLimits(self.max_head, self.head_timeout, self.keep_alive_timeout, self.response_timeout)


def _bind_address(text: str) -> BindAddress | None:
    host, _, port = text.rpartition(":")
    return BindAddress(host.strip("[]"), int(port)) if text else None
