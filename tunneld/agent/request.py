"""How an agent opens a tunnel: with which backend and which encryption, and how it recognizes the tunnel later."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from tunneld.agent.pool import PoolLimits
from tunneld.client import Client
from tunneld.client.client import Record
from tunneld.errors import NotAllowedError, RefusedError, RemoteProtocolError, TunneldError, UsageError
from tunneld.net.address import parse_ports
from tunneld.net.endpoint import Endpoint, is_loopback
from tunneld.policy.options import ANY_HOST, MAX_TUNNEL_PORTS
from tunneld.wire.lines import Value

if TYPE_CHECKING:
    from tunneld.tls.identity import Identity

AGENT_OPTIONS: Mapping[str, Value] = {"persist": True, "proxy_protocol": "v2"}
"""The agent needs a tunnel that outlives its connections, and a header that tells it about each visitor."""
HAS_CARRIERS = sys.platform == "linux"
"""Whether this system has epoll, which carriers and TLS connections need."""
NO_WEBMUX_CODES = frozenset({UsageError.code, NotAllowedError.code})
"""Codes with which a relay refuses a backend that it does not have, or that the credential may not use."""
AGE_TOLERANCE = 5.0
"""Seconds by which a tunnel's age may differ from the agent's clock: it is given in whole seconds over a slow line."""


@dataclass(frozen=True, slots=True)
class TunnelRequest:
    """What `open_tunnel` and the connections of the tunnel are asked for."""

    options: Mapping[str, Value] = field(default_factory=dict)  # of openTunnel; `AGENT_OPTIONS` are added
    limits: PoolLimits = field(default_factory=PoolLimits)
    keep_header: bool = False  # leave the PROXY header in front of the visitor's bytes
    backend: str | None = None  # None: webmux, or tcp if the relay or this system has no webmux
    identity: Identity | None = field(default=None, compare=False)  # with egtp: the key of this agent
    poll: int = 0  # with egtp: seconds between polls; 0: a connection is held

    @property
    def open_options(self) -> Mapping[str, Value]:
        """The options of openTunnel, with our node id where there is one."""
        return self.options if self.identity is None else {**self.options, "node": str(self.identity.id)}

    def with_options(self, **options: Value) -> TunnelRequest:
        """The same request with these options in addition, or changed."""
        return replace(self, options={**self.options, **options})

    def at_address(self, client: Endpoint) -> TunnelRequest:
        """The same request for a tunnel that gets its public address again: its port, or the host name that was
        chosen.
        """
        if "private" in self.options:
            return self  # the address is the name and the id of the node
        first, comma, rest = str(self.options.get("host", "")).partition(",")
        if not first:
            return self.with_options(client_port=client.port)
        host = client.host if first == ANY_HOST else first  # the URI has the first name
        return self.with_options(host=host + comma + rest)


@dataclass(frozen=True, slots=True)
class OpenTunnel:
    """A tunnel that this agent opened at the relay."""

    id: str
    server: Endpoint  # where the agent connects
    client: Endpoint  # where visitors connect
    opened_at: float  # in `trio.current_time`
    ports: tuple[int, ...] = ()  # the public ones, if there are several

    @property
    def age(self) -> float:
        """Seconds since it was opened."""
        return trio.current_time() - self.opened_at

    def matches(self, record: Record) -> bool:
        """Whether the relay's `record` is this tunnel, not one that a restarted relay opened later on the same port."""
        same = record.get("id") == self.id and record.get("client") == str(self.client)
        return same and int(record.get("age", "0")) + AGE_TOLERANCE >= self.age


async def open_tunnel(client: Client, options: Mapping[str, Value], backend: str | None = "tcp") -> OpenTunnel:
    """Open a tunnel for an agent. Raises `RefusedError`, `UsageError`, and as any call."""
    record = await _open(client, {**options, **AGENT_OPTIONS}, backend)
    try:
        server, public = Endpoint.parse(record["server"]), Endpoint.parse(record["client"])
        ports = parse_ports(record["ports"], MAX_TUNNEL_PORTS) if "ports" in record else ()
        return OpenTunnel(record["id"], server, public, trio.current_time(), tuple(ports))
    except (KeyError, ValueError, TunneldError) as error:
        raise RemoteProtocolError(f"relay {client.relay} sent an invalid description of a tunnel: {error}") from None


async def _open(client: Client, options: Mapping[str, Value], backend: str | None) -> Record:
    """Open a tunnel and return its description. Without a backend it is webmux, or tcp where there is no webmux.

    Encryption is never lost silently: if the control connection uses TLS, the other connections do, too, unless
    `secure` says otherwise. Raises as `open_tunnel`.
    """
    if backend == "tcp":
        return await _open_tcp(client, options)
    if backend is not None:
        return await client.open_described(backend, **options)
    if HAS_CARRIERS:
        try:
            return await client.open_described("webmux", **options)
        except RefusedError as error:
            if error.reply_code not in NO_WEBMUX_CODES or "webmux" not in str(error):
                raise  # something else in the request is wrong
    return await _open_tcp(client, options)


async def _open_tcp(client: Client, options: Mapping[str, Value]) -> Record:
    """Open a tcp tunnel with the strongest `secure` that both sides support."""
    if "secure" in options or (client.relay.scheme == "tcp" and is_loopback(client.relay_host)):
        return await client.open_described("tcp", **options)
    if client.relay.scheme == "tls":
        if not HAS_CARRIERS:
            raise UsageError(
                f"cannot encrypt the connections to relay {client.relay}: this system has no epoll; to send visitors' "
                "data unencrypted, use --backend tcp --secure no"
            )
        return await client.open_described("tcp", secure="yes", **options)
    try:
        return await client.open_described("tcp", secure="key", **options)
    except RefusedError as error:
        if error.reply_code != UsageError.code or "secure" not in str(error):
            raise
    return await client.open_described("tcp", **options)  # a relay that does not support keys
