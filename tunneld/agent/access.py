"""How an agent reaches its relay, and as whom."""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass, field

import trio

from tunneld.client import Client, connect
from tunneld.errors import RefusedError, RelayUnreachableError, RemoteProtocolError, UsageError, reason_of
from tunneld.net.dial import dial, resolve_relay
from tunneld.net.endpoint import Endpoint, parse_relay
from tunneld.tls.connection import TlsSocket, shake_hands
from tunneld.tls.contexts import client_tls_context

MAX_KEY_REPLY = 1024
"""Octets of the relay's answer to a key: OK, or a code and a sentence."""


SECRET_CHECK_INTERVAL = 5.0
"""Seconds between two looks at the file of a secret that is worth nothing any more. Only this machine is asked."""


@dataclass(slots=True)
class RelayAccess:
    """How to reach a relay's control port, and as whom: a credential is a name and its secret, which `reread` reads
    again where it is in a file. `timeout` in seconds bounds each step. Shared by all that reach this relay.
    """

    where: str
    tls: ssl.SSLContext | None = None
    timeout: float = 10.0
    credential: tuple[str, str] | None = field(default=None, repr=False)
    reread: Callable[[], str] | None = field(default=None, repr=False, compare=False)

    async def wait_for_another_secret(self, refused: tuple[str, str]) -> None:
        """Return once the credential is another one than that which was refused. The relay hears nothing of it before:
        each failure costs everybody at our address.
        """
        while self.credential == refused:
            await trio.sleep(SECRET_CHECK_INTERVAL)
            if self.reread is not None and self.credential == refused:
                with suppress(UsageError):  # it is just being written, say
                    self.credential = refused[0], self.reread()

    def connect(self) -> AbstractAsyncContextManager[Client]:
        """A control connection."""
        return connect(self.where, tls=self.tls, timeout=self.timeout, credential=self.credential)

    async def dial_carrier(self, uri: Endpoint) -> socket.socket | TlsSocket:
        """A connection to the port of a server URI: in TLS, where its scheme says so, with whoever shows the
        certificate of the control port. Raises `RelayUnreachableError`, or `RemoteProtocolError` for a wrong pin.
        """
        with self._reaching(uri):
            connection = await dial(await resolve_relay(uri.host, uri.port))
            if uri.scheme == "webmuxs":
                return await shake_hands(connection, self._context(), server_hostname=self._host)
            return connection

    async def dial_keyed(
        self, uri: Endpoint, session: ssl.SSLSession | None = None
    ) -> tuple[socket.socket | TlsSocket, bytes]:
        """A connection to a tcp tunnel's server side to which the key was shown, and what the relay has said behind
        its OK. `session` is that of an earlier one, see `TlsSocket.session`. Raises `RelayUnreachableError`,
        `RefusedError`, or `RemoteProtocolError`, also for a wrong pin.
        """
        with self._reaching(uri):
            connection = await dial(await resolve_relay(uri.host, uri.port))
            way: socket.socket | TlsSocket = connection
            try:
                if uri.scheme == "tls":
                    way = TlsSocket(connection, self._context(), server_hostname=self._host, session=session)
                    await way.shake_hands()
                return way, await _show_key(way, uri)
            except BaseException:
                way.close()
                raise

    @contextmanager
    def _reaching(self, uri: Endpoint) -> Iterator[None]:
        """One attempt to connect, in bounded time and with one kind of error."""
        try:
            with trio.fail_after(self.timeout):
                yield
        except trio.TooSlowError:
            reason = f"no answer in {self.timeout:g} s"
        except OSError as error:
            reason = reason_of(error)
        else:
            return
        raise RelayUnreachableError(f"could not connect to {uri.without_key}: {reason}")

    def _context(self) -> ssl.SSLContext:
        return self.tls or _usual_context()

    @property
    def _host(self) -> str:
        return parse_relay(self.where).host


@functools.cache
def _usual_context() -> ssl.SSLContext:
    """One for all connections: a session (`TlsSocket.session`) belongs to its context."""
    return client_tls_context()


async def _show_key(way: socket.socket | TlsSocket, uri: Endpoint) -> bytes:
    """Say the key and hear OK, tunneld-control(7); what came behind it. Raises as `dial_keyed`."""
    line = f"{uri.key}\n".encode()
    if isinstance(way, TlsSocket):
        await way.send_all(line)
    else:
        way.send(line)
    heard = b""
    while (end := heard.find(b"\n")) < 0:
        if len(heard) >= MAX_KEY_REPLY:
            raise RemoteProtocolError(f"the port of {uri.without_key} does not answer as a tunneld does")
        if isinstance(way, TlsSocket):
            more = await way.receive(MAX_KEY_REPLY - len(heard))
        else:
            await trio.lowlevel.wait_readable(way)
            more = way.recv(1)  # the line and not an octet more: the next may be a visitor's
        if not more:
            raise RelayUnreachableError(f"the relay hung up at {uri.without_key} without an answer to the key")
        heard += more
    verdict, _, reason = heard[:end].decode(errors="replace").partition(" ")
    if verdict != "OK":
        code, _, text = reason.partition(" ")
        raise RefusedError(code, f"the relay does not take us at {uri.without_key}: {text}")
    return heard[end + 1 :]
