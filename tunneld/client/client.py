"""The other end of the control protocol, for the agent, the command line and Trio programs.

    async with connect("relay.example.org:7010") as client:
        server_uri = await client.open_tunnel()
        print(await client.get_tunnel_address(server_uri))

One connection carries one request at a time; several tasks may share a client and take turns. A call that is
cancelled or too slow harms no other.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from tunneld.client.exchange import Answer, ControlExchange, Record, why
from tunneld.client.login import authenticate
from tunneld.errors import RelayUnreachableError, RemoteProtocolError, reason_of
from tunneld.net.endpoint import Endpoint, parse_relay, unmap
from tunneld.tls.connection import PEER_CLOSED
from tunneld.tls.contexts import client_tls_context
from tunneld.wire.lines import Request, Value

PROTOCOL = "1"
"""The version of the control protocol that this client speaks."""

GOODBYE = 1.0
"""Seconds that a relay may take to accept the end of a TLS connection."""

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


@asynccontextmanager
async def connect(
    relay: str,
    *,
    tls: ssl.SSLContext | None = None,
    timeout: float = 10.0,
    credential: tuple[str, str] | None = None,
) -> AsyncIterator[Client]:
    """Connect to a relay's control port; the connection ends with the `async with`, its tunnels stay.

    `relay` is `HOST:PORT`, `tcp://HOST:PORT` or `tls://HOST:PORT`, each of them also without the port, which is 7010
    then. A context in `tls` means TLS in any case; `tls://` without one checks the relay's certificate as the system
    does. `timeout` is in seconds and bounds each step: to reach the relay, to shake hands, to be greeted, and later
    each answer. `credential` is a name and its secret, which is proved and never sent; the relay must prove that it
    knows it, too.

    Raises `UsageError`, `RelayUnreachableError`, `RemoteProtocolError` (not a tunneld, or not the one that knows the
    secret), `RefusedError` (it is full, or the secret is wrong), `NotAllowedError` (it wants a credential).

        async with connect("tls://relay.example.org:7010", tls=client_tls_context("ca.pem")) as client:
            print(await client.status())
    """
    endpoint = parse_relay(relay, tls=tls is not None)
    stream = await _dial(endpoint, tls, timeout)
    try:
        exchange = ControlExchange(str(endpoint), stream, timeout)
        version, method = await _hear_greeting(exchange, endpoint)
        await authenticate(exchange, endpoint, method, credential)
        yield Client(endpoint, version, _ends(stream), exchange, tls)
    finally:
        with trio.move_on_after(GOODBYE):
            await stream.aclose()


class Client:
    """A control connection, made by `connect`.

    `relay` is whom it reaches, as a URI, `tls` the context it was verified with, if one was given, `version` what runs
    there; `relay_host` and `local_host` are the addresses of the connection's two ends.

    Every call raises `RefusedError`, with the relay's code, where it says no; `RelayUnreachableError` when the
    connection is lost or the answer does not come in time; `UsageError` for what a request cannot carry.
    """

    def __init__(
        self,
        relay: Endpoint,
        version: str,
        ends: tuple[str, str],
        exchange: ControlExchange,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.relay = relay
        self.tls = tls
        self.version = version
        self.local_host, self.relay_host = ends
        self._exchange = exchange

    @property
    def timeout(self) -> float:
        """Seconds to wait for each answer; may be set."""
        return self._exchange.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._exchange.timeout = seconds

    async def call(self, verb: str, *args: str, **options: Value) -> Answer:
        """Any verb of tunneld-control(7); an option that is None is not sent.

        answer = await client.call("shutdown", "drain")
        """
        texts = {key: _text(value) for key, value in options.items() if value is not None}
        return await self._exchange.request(Request(verb, args, texts))

    async def wait_lost(self) -> None:
        """Wait until the connection is lost; the next call says why. Calls may be made meanwhile.

        await client.wait_lost()
        """
        await self._exchange.wait_lost()

    async def open_tunnel(self, backend: str = "tcp", **options: Value) -> str:
        """Open a tunnel and return its server URI: where the hidden server connects.

        uri = await client.open_tunnel(persist=True, name="blog", ttl=3600)
        """
        return (await self.call("openTunnel", backend, **options)).text

    async def get_tunnel_address(self, uri: str) -> str:
        """Return the client URI that belongs to a server URI: what the world is told.

        print(await client.get_tunnel_address(uri))
        """
        return (await self.call("getTunnelAddress", uri)).text

    async def close(self, ref: str, *, keep: bool = False) -> str:
        """Stop a tunnel, given by server URI or id, now; all its connections drop. Its address is anybody's then, or
        with `keep` reserved for one of the same name.

        await client.close("t4")
        """
        return (await self.call("close", ref, *(("keep",) if keep else ()))).text

    async def drain(self, ref: str) -> str:
        """Let a tunnel's relays finish and take nobody new; returns before they have.

        await client.drain(uri)
        """
        return (await self.call("drain", ref)).text

    async def list(self) -> Sequence[Record]:
        """All open tunnels, oldest first.

        busy = [tunnel["id"] for tunnel in await client.list() if tunnel["visitors"] != "0"]
        """
        return (await self.call("list")).items

    async def show(self, ref: str) -> Sequence[Record]:
        """One tunnel, then each of its visitors.

        tunnel, *visitors = await client.show("t4")
        """
        return (await self.call("show", ref)).items

    async def status(self) -> Record:
        """The daemon in one line of facts.

        print((await client.status())["uptime"])
        """
        items = (await self.call("status")).items
        return items[0] if items else {}

    def watch(self, ref: str | None = None) -> AbstractAsyncContextManager[AsyncIterator[Record]]:
        """What happens, everywhere or to one tunnel, while the `async with` lasts. Calls need another client meanwhile.

        A refusal comes out of the iteration. The iteration waits for ever: silence means that nothing happens.

            async with client.watch() as events:
                async for event in events:
                    print(event["event"], event.get("id"))
        """
        return self._exchange.watch(Request("watch", (ref,) if ref else ()))


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


async def _dial(endpoint: Endpoint, tls: ssl.SSLContext | None, timeout: float) -> Stream:
    step = "reach"
    try:
        with trio.fail_after(timeout):
            transport = await trio.open_tcp_stream(endpoint.host, endpoint.port)
        if endpoint.scheme == "tcp":
            return transport
        step = "shake hands with"
        with trio.fail_after(timeout):
            return await _encrypt(transport, tls or client_tls_context(), endpoint.host)
    except trio.TooSlowError:
        reason = f"no answer for {timeout:g} s"
    except OSError as error:
        reason = _innermost(error)
    except trio.BrokenResourceError as error:
        reason = why(error)
        if reason == PEER_CLOSED or isinstance(error.__cause__, ConnectionResetError):
            reason += "; after a wrong secret, it does that for some time to everybody at the same address"
    raise RelayUnreachableError(f"could not {step} relay {endpoint}: {reason}")


async def _encrypt(transport: trio.SocketStream, tls: ssl.SSLContext, host: str) -> trio.SSLStream[trio.SocketStream]:
    stream = trio.SSLStream(transport, tls, server_hostname=host)
    try:
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    return stream


def _innermost(error: OSError) -> str:
    """The system's own reason: Trio wraps it in where it went, and that in "all attempts failed"."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    found = cause if isinstance(cause, OSError) else error
    number = found.errno or 0
    return reason_of(
        OSError(number, os.strerror(number)) if number > 0 else found
    )  # getaddrinfo's numbers are negative


def _ends(stream: Stream) -> tuple[str, str]:
    """Our address and the relay's."""
    socket = (stream if isinstance(stream, trio.SocketStream) else stream.transport_stream).socket
    try:
        return unmap(socket.getsockname()[0]), unmap(socket.getpeername()[0])
    except OSError:
        return "", ""  # gone between the greeting and here; the next call says so


async def _hear_greeting(exchange: ControlExchange, endpoint: Endpoint) -> tuple[str, str]:
    """The relay's version and how it wants us to authenticate, out of `tunneld VERSION protocol=1 auth=none`."""
    where = "give the address of a control port"
    try:
        greeting = await exchange.hear_greeting()
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{error}; {where}") from None
    except RelayUnreachableError as error:
        hint = "does it ask for a certificate?" if endpoint.scheme == "tls" else "does it want TLS (tls://)?"
        raise RelayUnreachableError(f"{error}; {hint}") from None
    name, version, *facts = [*greeting.split(), "", ""]
    if name != "tunneld":
        raise RemoteProtocolError(f"relay {endpoint} is no tunneld: it said {greeting!r}; {where}")
    named = dict(fact.partition("=")[::2] for fact in facts)
    protocol = named.get("protocol", "")
    if protocol != PROTOCOL:
        raise RemoteProtocolError(
            f"relay {endpoint} speaks protocol {protocol!r}, we speak {PROTOCOL}; update the older one"
        )
    return version, named.get("auth", "none")
