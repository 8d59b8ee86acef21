"""How an agent reaches its relay, and as whom."""

from __future__ import annotations

import socket
import ssl
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio

from tunneld.agent.dial import dial, resolve_relay
from tunneld.client import Client, connect
from tunneld.endpoint import Endpoint, parse_host_port
from tunneld.errors import RelayUnreachableError, reason_of
from tunneld.net import client_tls_context, shake_hands


@dataclass(frozen=True, slots=True)
class RelayAccess:
    """How to reach a relay's control port, and as whom: a credential is a name and its secret. `timeout` in seconds
    bounds each step.
    """

    where: str
    tls: ssl.SSLContext | None = None
    timeout: float = 10.0
    credential: tuple[str, str] | None = field(default=None, repr=False)

    def connect(self) -> AbstractAsyncContextManager[Client]:
        """A control connection."""
        return connect(self.where, tls=self.tls, timeout=self.timeout, credential=self.credential)

    async def dial_carrier(self, uri: Endpoint) -> socket.socket:
        """A connection to the port of a server URI: in TLS, where its scheme says so, with whoever shows the
        certificate of the control port. Raises `RelayUnreachableError`, or `RemoteProtocolError` for a wrong pin.
        """
        try:
            with trio.fail_after(self.timeout):
                connection = await dial(await resolve_relay(uri.host, uri.port))
                if uri.scheme == "webmuxs":
                    return await shake_hands(connection, self._context(), server_hostname=self._host)
                return connection
        except trio.TooSlowError:
            reason = f"no answer in {self.timeout:g} s"
        except OSError as error:
            reason = reason_of(error)
        raise RelayUnreachableError(f"could not connect to {uri.without_key}: {reason}")

    def _context(self) -> ssl.SSLContext:
        return self.tls or client_tls_context()

    @property
    def _host(self) -> str:
        return parse_host_port(self.where.rpartition("://")[2].rstrip("/"))[0]
