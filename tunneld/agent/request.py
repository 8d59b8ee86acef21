"""How an agent opens a tunnel: over which backend, with which proof, and how it knows the tunnel again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from tunneld.agent.pool import PoolLimits
from tunneld.client import Client
from tunneld.errors import NotAllowedError, RefusedError, RemoteProtocolError, TunneldError, UsageError
from tunneld.net.endpoint import Endpoint, is_loopback
from tunneld.wire.lines import Value

OUR_OPTIONS: Mapping[str, Value] = {"persist": True, "proxy_protocol": "v2"}
"""The pool needs a tunnel that outlives its relays, and the header that tells it of each visitor."""
HAS_CARRIERS = sys.platform == "linux"
NO_WEBMUX = frozenset({UsageError.code, NotAllowedError.code})
"""How a relay refuses a backend that it does not have, or that the credential may not use."""
SLACK = 5.0
"""Seconds by which a tunnel's age, told in whole seconds over a slow line, may differ from ours."""


@dataclass(frozen=True, slots=True)
class TunnelRequest:
    """What kind of tunnel is wanted."""

    options: Mapping[str, Value] = field(default_factory=dict)  # of openTunnel; `OUR_OPTIONS` come on top
    limits: PoolLimits = field(default_factory=PoolLimits)
    keep_header: bool = False  # leave the PROXY header in front of what the visitor says
    backend: str | None = None  # None: webmux, or tcp where the relay or this system has no webmux


@dataclass(frozen=True, slots=True)
class OpenTunnel:
    """A tunnel of ours at the relay."""

    id: str
    server: Endpoint  # where our parked connections go
    client: Endpoint  # where clients connect
    opened_at: float  # in `trio.current_time`

    @property
    def age(self) -> float:
        """Seconds since it was opened."""
        return trio.current_time() - self.opened_at

    def is_described_by(self, record: Mapping[str, str]) -> bool:
        """Whether `record` is this tunnel, and not one that a restarted relay has opened on the same port since."""
        same = record.get("id") == self.id and record.get("client") == str(self.client)
        return same and int(record.get("age", "0")) + SLACK >= self.age


async def open_tunnel(client: Client, options: Mapping[str, Value], backend: str | None = "tcp") -> OpenTunnel:
    """Open a tunnel for a supply. Raises `RefusedError` and what else a call raises."""
    uri = await _open(client, {**options, **OUR_OPTIONS}, backend)
    record = (await client.show(uri))[0]
    try:
        return OpenTunnel(record["id"], Endpoint.parse(uri), Endpoint.parse(record["client"]), trio.current_time())
    except (KeyError, TunneldError) as error:
        raise RemoteProtocolError(f"relay {client.relay} describes tunnel {uri} oddly: {error}") from None


async def _open(client: Client, options: Mapping[str, Value], backend: str | None) -> str:
    """The server URI.

    Where nobody chose a backend it is webmux, or else tcp. Who asked the relay for encryption does not lose it without
    a word: where the control connection is in TLS, so are the others, unless `secure` says otherwise. Raises
    `UsageError`.
    """
    if backend == "tcp":
        return await _open_tcp(client, options)
    if backend is not None:
        return await client.open_tunnel(backend, **options)
    if HAS_CARRIERS:
        try:
            return await client.open_tunnel("webmux", **options)
        except RefusedError as error:
            if error.reply_code not in NO_WEBMUX or "webmux" not in str(error):
                raise  # something else is wrong with what was asked
    return await _open_tcp(client, options)


async def _open_tcp(client: Client, options: Mapping[str, Value]) -> str:
    """With the best proof that both sides can give."""
    if "secure" in options or (client.relay.scheme == "tcp" and is_loopback(client.relay_host)):
        return await client.open_tunnel("tcp", **options)
    if client.relay.scheme == "tls":
        if not HAS_CARRIERS:
            raise UsageError(
                f"visitors' bytes would cross to relay {client.relay} unencrypted, since this system has no epoll; say "
                "--backend tcp --secure no if that is meant"
            )
        return await client.open_tunnel("tcp", secure="yes", **options)
    try:
        return await client.open_tunnel("tcp", secure="key", **options)
    except RefusedError as error:
        if error.reply_code != UsageError.code or "secure" not in str(error):
            raise
    return await client.open_tunnel("tcp", **options)  # a relay that cannot ask for a key
