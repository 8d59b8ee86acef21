"""How an agent reaches its relay, and with which credential."""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass, field

import trio

from tunneld.client import Client, connect
from tunneld.client.client import receive_greeting
from tunneld.client.exchange import ControlExchange
from tunneld.client.login import authenticate
from tunneld.errors import (
    DIAL_SHORTAGES,
    RefusedError,
    RelayUnreachableError,
    RemoteProtocolError,
    ShortageError,
    UsageError,
    reason_of,
)
from tunneld.net.dial import dial, resolve_relay
from tunneld.net.endpoint import Endpoint, parse_relay
from tunneld.net.sockets import taken_out
from tunneld.tls.connection import CARRIER_PROTOCOL, CONTROL_PROTOCOL, TlsSocket, shake_hands
from tunneld.tls.contexts import client_tls_context
from tunneld.tls.stream import TlsStream
from tunneld.wire.lines import ControlRequest

MAX_KEY_REPLY = 1024
"""Bytes of the relay's reply to a tunnel key: `OK`, or `ERR`, a code and a sentence."""

SECRET_CHECK_INTERVAL = 5.0
"""Seconds between two reads of a secret file whose secret was refused. The file is read, the relay is not asked."""


MAX_CONCURRENT_DIALS = 8
"""Connections of a process being made at once to one relay: half of what a relay accepts from one address by default.
Until it has presented its key, each of them is unauthenticated there.
"""


@dataclass(slots=True)
class RelayAccess:
    """How to reach a relay's control port. All exposures at one relay share one of these.

    `credential` is a name and a secret. `reread_secret` returns the present secret if that comes from a file, else it
    is None. `secret_source` says where the secret comes from, for error messages. `timeout` bounds each step, in
    seconds. Whatever makes a connection that has to present a key holds `dialing` until the relay has accepted it.
    """

    where: str
    tls: ssl.SSLContext | None = None
    timeout: float = 10.0
    credential: tuple[str, str] | None = field(default=None, repr=False)
    reread_secret: Callable[[], str] | None = field(default=None, repr=False, compare=False)
    secret_source: str = field(default="", compare=False)
    shares_port: bool = field(default=False, compare=False)  # carriers go to the port of the control connection, too
    shares_carriers: bool = field(default=False, compare=False)  # the relay takes several tunnels on a carrier
    carrier_session: ssl.SSLSession | None = field(
        default=None, repr=False, compare=False
    )  # for the next one to resume
    visit_session: ssl.SSLSession | None = field(default=None, repr=False, compare=False)  # for the next one to resume
    dialing: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(MAX_CONCURRENT_DIALS), repr=False, compare=False
    )

    async def wait_for_new_secret(self, refused: tuple[str, str]) -> None:
        """Wait until `credential` differs from the `refused` one, rereading the secret file now and then.

        The relay is not contacted meanwhile: every failed login counts against this address.
        """
        while self.credential == refused:
            await trio.sleep(SECRET_CHECK_INTERVAL)
            if self.reread_secret is not None and self.credential == refused:
                with suppress(UsageError):  # for example while the file is being written
                    self.credential = refused[0], self.reread_secret()

    def connect(self) -> AbstractAsyncContextManager[Client]:
        """Open a control connection, for the length of an `async with`. Raises as `tunneld.client.connect`."""
        return connect(
            self.where,
            tls=self.tls,
            timeout=self.timeout,
            credential=self.credential,
            secret_source=self.secret_source,
        )

    async def dial_carrier(self, uri: Endpoint) -> socket.socket | TlsSocket:
        """Connect to the port of a webmux server URI, or to the one that it shares with the control connection; the
        caller owns the connection.

        With the scheme `webmuxs` the connection uses TLS, and the peer must show the certificate of the control port.
        Raises `RelayUnreachableError`, `ShortageError`, or `RemoteProtocolError` for a wrong pin.
        """
        with self.connecting(uri):
            where = parse_relay(self.where) if self.shares_port else uri
            connection = await dial(await resolve_relay(where.host, where.port))
            if uri.scheme == "webmuxs":
                return await shake_hands(
                    connection,
                    self._tls_context(),
                    server_hostname=self._host,
                    protocol=CARRIER_PROTOCOL,
                    session=self.carrier_session,
                )
            return connection

    async def visit(self, what: str, wait: float) -> tuple[socket.socket | TlsSocket, bytes, str]:
        """Ask the relay for a visit to a private tunnel, by its address or by a ticket; `wait` is how many seconds
        longer than for other answers to wait for its agent.

        Returns the connection, which is that to the agent from now on and the caller's, the bytes that arrived after
        the relay's OK, and the text of it. Raises as `connect`.
        """
        endpoint = parse_relay(self.where, tls=self.tls is not None)
        async with self.dialing:
            connection = await self._dial_control(endpoint)
        stream = _stream_of(connection)
        try:
            exchange = ControlExchange(str(endpoint), stream, self.timeout)
            _version, features = await receive_greeting(exchange, endpoint)
            method = features.get("auth", "none")
            if isinstance(connection, TlsSocket):
                self.visit_session = connection.session(self.visit_session)
            if self.credential is not None or "@" in what:
                await authenticate(exchange, endpoint, method, self.credential, self.secret_source)
            exchange.timeout += wait
            answer = await exchange.request(ControlRequest("visitTunnel", (what,)))
        except BaseException:
            connection.close()
            raise
        if isinstance(stream, TlsStream):
            return stream.detach(), exchange.take_rest(), answer.text
        return taken_out(stream.socket), exchange.take_rest(), answer.text

    async def _dial_control(self, endpoint: Endpoint) -> socket.socket | TlsSocket:
        """Connect to the control port. Raises as `dial_carrier`."""
        with self.connecting(endpoint):
            connection = await dial(await resolve_relay(endpoint.host, endpoint.port))
            if endpoint.scheme == "tcp":
                return connection
            return await shake_hands(
                connection,
                self._tls_context(),
                server_hostname=endpoint.host,
                protocol=CONTROL_PROTOCOL,
                session=self.visit_session,
            )

    async def dial_keyed(
        self, uri: Endpoint, keepalive: float, session: ssl.SSLSession | None = None
    ) -> tuple[socket.socket | TlsSocket, bytes]:
        """Connect to a tcp tunnel's server side and present the tunnel's key; the caller owns the connection.

        Returns the connection and the bytes that arrived after the relay's OK. `keepalive` is the silence in seconds
        before TCP probes the relay, `session` the TLS session of an earlier connection, see `TlsSocket.session`. Raises
        `RelayUnreachableError`, `ShortageError`, `RefusedError`, or `RemoteProtocolError`, also for a wrong pin.
        """
        with self.connecting(uri):
            connection = await dial(await resolve_relay(uri.host, uri.port), keepalive)
            stream: socket.socket | TlsSocket = connection
            try:
                if uri.scheme == "tls":
                    stream = TlsSocket(connection, self._tls_context(), server_hostname=self._host, session=session)
                    await stream.shake_hands()
                return stream, await _present_key(stream, uri)
            except BaseException:
                stream.close()
                raise

    @contextmanager
    def connecting(self, uri: Endpoint) -> Iterator[None]:
        """Bound an attempt to connect by the timeout, and turn `OSError` into `RelayUnreachableError`, or into
        `ShortageError` where this machine has no descriptor or port left.
        """
        try:
            with trio.fail_after(self.timeout):
                yield
        except trio.TooSlowError:
            reason = f"no answer in {self.timeout:g} s"
        except OSError as error:
            reason = reason_of(error)
            if error.errno in DIAL_SHORTAGES:
                raise ShortageError(f"could not connect to {uri.without_key}: {reason}") from None
        else:
            return
        raise RelayUnreachableError(f"could not connect to {uri.without_key}: {reason}")

    def _tls_context(self) -> ssl.SSLContext:
        return self.tls or _default_tls_context()

    @property
    def _host(self) -> str:
        return parse_relay(self.where).host


@functools.cache
def _default_tls_context() -> ssl.SSLContext:
    """One context for all connections, because a TLS session can only be resumed with the context it came from."""
    return client_tls_context()


def _stream_of(connection: socket.socket | TlsSocket) -> trio.SocketStream | TlsStream:
    if isinstance(connection, TlsSocket):
        return TlsStream(connection)
    return trio.SocketStream(trio.socket.from_stdlib_socket(connection))


async def _present_key(stream: socket.socket | TlsSocket, uri: Endpoint) -> bytes:
    """Send the tunnel's key and wait for OK, see tunneld-control(7). Returns the bytes after it.

    On a plain socket the reply is read byte by byte, so nothing after it is taken from the kernel. Raises as
    `dial_keyed`.
    """
    line = f"{uri.key}\n".encode()
    if isinstance(stream, TlsSocket):
        await stream.send_all(line)
    else:
        stream.send(line)
    received = b""
    while (end := received.find(b"\n")) < 0:
        if len(received) >= MAX_KEY_REPLY:
            raise RemoteProtocolError(
                f"{uri.without_key} is not a tunneld relay: its reply to the tunnel key is too long"
            )
        if isinstance(stream, TlsSocket):
            data = await stream.receive(MAX_KEY_REPLY - len(received))
        else:
            await trio.lowlevel.wait_readable(stream)
            data = stream.recv(1)  # the next byte may be a visitor's
        if not data:
            raise RelayUnreachableError(f"the relay closed the connection to {uri.without_key} without a reply")
        received += data
    verdict, _, reason = received[:end].decode(errors="replace").partition(" ")
    if verdict != "OK":
        code, _, text = reason.partition(" ")
        raise RefusedError(code, f"the relay refused the connection to {uri.without_key}: {text}")
    return received[end + 1 :]
