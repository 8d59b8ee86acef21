"""A control connection to a relay, with the verbs of the control protocol as methods.

    async with connect("relay.example.org:7010") as client:
        server_uri = await client.open_tunnel()
        print(await client.get_tunnel_address(server_uri))

Several tasks may share a client: their requests are sent as they come, and answered in that order. A call that is
cancelled or times out does not affect later ones.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio

from tunneld.client.exchange import Answer, ControlExchange, TextRecord
from tunneld.client.login import authenticate
from tunneld.client.transport import addresses_of, dial_relay
from tunneld.errors import (
    RelayUnreachableError,
    RemoteProtocolError,
    UsageError,
)
from tunneld.net.endpoint import Endpoint, parse_relay
from tunneld.wire.lines import ControlRequest, Value
from tunneld.wire.records import typed_record

PROTOCOL = "1"
"""The version of the control protocol that this client speaks."""

Record = Mapping[str, Any]
"""An item of an answer, with the keys that tunneld-control(7) lists: numbers are integers, yes and no are booleans."""

NOT_TRIO = (
    "tunneld runs on Trio, and this is not inside trio.run(); from asyncio, open tunnels over XML-RPC or JSON, which "
    "need no library of ours, run `tunnel expose` with asyncio.create_subprocess_exec, or run Trio inside the asyncio "
    "loop with trio.lowlevel.start_guest_run"
)

NO_FEATURES: Mapping[str, str] = {}

TLS_CLOSE_TIMEOUT = 1.0
"""Seconds for the relay to accept the end of a TLS connection."""


def check_trio() -> None:
    """Raise `UsageError`, with what to do instead, in a program that runs on something else than Trio."""
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        raise UsageError(NOT_TRIO) from None


@asynccontextmanager
async def connect(
    relay: str,
    *,
    tls: ssl.SSLContext | None = None,
    timeout: float = 10.0,
    credential: tuple[str, str] | None = None,
    secret_source: str = "",
) -> AsyncIterator[Client]:
    """Connect to a relay's control port, for the length of the `async with`; tunnels opened by it stay open.

    `relay` is `HOST:PORT`, `tcp://HOST:PORT` or `tls://HOST:PORT`; the default port is 7010. With a context in `tls`
    the connection uses TLS in any case; `tls://` without one checks the relay's certificate against the system's
    authorities. `timeout` is in seconds and bounds each step: the connection, the TLS handshake, the greeting, and
    later each answer. `credential` is a name and its secret. The secret is proved and never sent, and the relay must
    prove that it knows it, too. `secret_source` says where the secret comes from, for error messages.

    Raises `UsageError` (also outside `trio.run`), `RelayUnreachableError`, `RemoteProtocolError` (not a tunneld relay,
    or one that does not know the secret), `RefusedError` (the relay is full, or the secret is wrong), `NotAllowedError`
    (it requires a credential).

        async with connect("tls://relay.example.org:7010", tls=client_tls_context("ca.pem")) as client:
            print(await client.status())
    """
    check_trio()
    endpoint = parse_relay(relay, tls=tls is not None)
    stream = await dial_relay(endpoint, tls, timeout)
    try:
        exchange = ControlExchange(str(endpoint), stream, timeout)
        version, features = await receive_greeting(exchange, endpoint)
        await authenticate(exchange, endpoint, features.get("auth", "none"), credential, secret_source)
        yield Client(endpoint, version, addresses_of(stream), exchange, tls, features)
    finally:
        with trio.move_on_after(TLS_CLOSE_TIMEOUT):
            await stream.aclose()


class Client:
    """A control connection, made by `connect`.

    `relay` is the relay's URI, `tls` the context that was passed to `connect`, `version` the version of tunneld on the
    relay, `latency` the seconds that its last answer took; `relay_host` and `local_host` are the addresses of the
    connection's two ends. `features` are the keys of the greeting, see tunneld-control(7).

    Every call raises `RefusedError`, with the relay's code, if the relay refuses; `RelayUnreachableError` if the
    connection is lost or the answer does not come in time; `UsageError` for arguments that a request cannot carry.
    """

    def __init__(
        self,
        relay: Endpoint,
        version: str,
        addresses: tuple[str, str],
        exchange: ControlExchange,
        tls: ssl.SSLContext | None = None,
        features: Mapping[str, str] = NO_FEATURES,
    ) -> None:
        self.relay = relay
        self.features = features
        self.tls = tls
        self.version = version
        self.local_host, self.relay_host = addresses
        self.latency: float | None = None
        self._exchange = exchange

    @property
    def shares_port(self) -> bool:
        """Whether the relay takes carriers on the port of this connection, too, which is its HTTPS port."""
        return self.features.get("carriers") == "here"

    @property
    def shares_carriers(self) -> bool:
        """Whether the relay takes several tunnels on one carrier."""
        return self.features.get("tunnels") == "shared"

    @property
    def timeout(self) -> float:
        """Seconds to wait for each answer. Can be set."""
        return self._exchange.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._exchange.timeout = seconds

    async def call(self, verb: str, *args: str, **options: Value) -> Answer:
        """Call any verb of tunneld-control(7). Options with the value None are not sent. The values in the answer's
        items are text, as they come.

        `answer = await client.call("shutdown", "drain")`
        """
        texts = {key: _text(value) for key, value in options.items() if value is not None}
        asked_at = trio.current_time()
        answer = await self._exchange.request(ControlRequest(verb, args, texts))
        self.latency = trio.current_time() - asked_at
        return answer

    def stream(self, verb: str, *args: str, **options: Value) -> AbstractAsyncContextManager[AsyncIterator[TextRecord]]:
        """Call a verb that streams items, for the length of the `async with`. As in `call`, all values are text.

        `async with client.stream("watch", "t4", since="1h") as events: ...`
        """
        texts = {key: _text(value) for key, value in options.items() if value is not None}
        return self._exchange.watch(ControlRequest(verb, args, texts))

    async def wait_lost(self) -> str:
        """Wait until the connection is lost, and return the reason. Calls can be made meanwhile.

        `print(await client.wait_lost())`
        """
        return await self._exchange.wait_lost()

    @property
    def answering(self) -> bool:
        """False once the connection is lost, and while the relay has not answered in time.

        `if not client.answering: ...`
        """
        return self._exchange.answering

    def give_up(self, reason: str) -> None:
        """Count the connection as lost: every call that waits, and every later one, raises `reason`.

        `client.give_up("this machine no longer has its address")`
        """
        self._exchange.give_up(reason)

    async def open_tunnel(self, backend: str = "tcp", **options: Value) -> str:
        """Open a tunnel and return its server URI: where the hidden server connects.

        `uri = await client.open_tunnel(persist=True, name="blog", ttl=3600)`
        """
        return (await self.call("openTunnel", backend, **options)).text

    async def open_described(self, backend: str = "tcp", **options: Value) -> Record:
        """Open a tunnel and return its description, which has at least its `id`, `server` and `client` URIs.

        `tunnel = await client.open_described("webmux", persist=True)`
        """
        if self.features.get("opens") != "described":
            return (await self.show(await self.open_tunnel(backend, **options)))[0]
        answer = await self.call("openTunnel", backend, "described", **options)
        return {"server": answer.text, **(typed_record(answer.items[0]) if answer.items else {})}

    async def get_tunnel_address(self, uri: str) -> str:
        """Return the public address, as a URI, of the tunnel with this server URI.

        `print(await client.get_tunnel_address(uri))`
        """
        return (await self.call("getTunnelAddress", uri)).text

    async def close(self, ref: str, *, keep: bool = False) -> str:
        """Close a tunnel, given by server URI or id, now; all its connections are dropped. Its address becomes free, or
        with `keep` stays reserved for a tunnel of the same name.

        `await client.close("t4")`
        """
        return (await self.call("close", ref, *(("keep",) if keep else ()))).text

    async def drain(self, ref: str) -> str:
        """Let a tunnel's visitors finish and take no new ones; returns before they have finished.

        `await client.drain(uri)`
        """
        return (await self.call("drain", ref)).text

    async def list(self) -> Sequence[Record]:
        """Return all open tunnels, oldest first.

        `busy = [tunnel["id"] for tunnel in await client.list() if tunnel["visitors"]]`
        """
        return [typed_record(item) for item in (await self.call("list")).items]

    async def show(self, ref: str) -> Sequence[Record]:
        """Return one tunnel, then each of its visitors.

        `tunnel, *visitors = await client.show("t4")`
        """
        return [typed_record(item) for item in (await self.call("show", ref)).items]

    async def status(self) -> Record:
        """Return facts about the relay, such as its uptime.

        `print((await client.status())["uptime"])`
        """
        items = (await self.call("status")).items
        return typed_record(items[0]) if items else {}

    @asynccontextmanager
    async def watch(
        self, ref: str | None = None, *, since: float | None = None
    ) -> AsyncIterator[AsyncIterator[Record]]:
        """Return events of all tunnels or of one, for the length of the `async with`. Calls need another client
        meanwhile. With `since`, those of so many seconds until now come first, and an event `live` after them.

        The iteration raises a refusal. It waits without a timeout: silence means that nothing happens.

            async with client.watch() as events:
                async for event in events:
                    print(event["event"], event.get("id"))
        """
        seconds = None if since is None else max(1, round(since))
        async with self.stream("watch", *((ref,) if ref else ()), since=seconds) as items:
            yield _TypedRecords(items)


class _TypedRecords:
    """Items with typed values. Not an async generator, which would need finalizing when left half-read."""

    def __init__(self, items: AsyncIterator[TextRecord]) -> None:
        self._items = items

    def __aiter__(self) -> _TypedRecords:
        return self

    async def __anext__(self) -> Record:
        return typed_record(await anext(self._items))


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


async def receive_greeting(exchange: ControlExchange, endpoint: Endpoint) -> tuple[str, Mapping[str, str]]:
    """The relay's version, and the keys of its greeting: `tunneld VERSION protocol=1 auth=METHOD carriers=here`."""
    advice = "check the address: it must be a relay's control port"
    try:
        greeting = await exchange.receive_greeting()
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{error}; {advice}") from None
    except RelayUnreachableError as error:
        tls = endpoint.scheme == "tls"
        hint = "it may require a client certificate (--cert and --key)" if tls else "it may require TLS: use tls://"
        raise RelayUnreachableError(f"{error}; {hint}") from None
    name, version, *words = [*greeting.split(), "", ""]
    if name != "tunneld":
        raise RemoteProtocolError(f"{endpoint} is not a tunneld relay: its greeting is {greeting!r}; {advice}")
    fields = dict(word.partition("=")[::2] for word in words)
    protocol = fields.get("protocol", "")
    if protocol != PROTOCOL:
        raise RemoteProtocolError(
            f"relay {endpoint} speaks version {protocol!r} of the control protocol, this program version {PROTOCOL!r}; "
            "update the older one"
        )
    return version, fields
