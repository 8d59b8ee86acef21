"""The connection below the control protocol: TCP, perhaps TLS, and why it failed, in words for its user."""

from __future__ import annotations

import os
import ssl

import trio

from tunneld.client.exchange import why
from tunneld.errors import LimitReachedError, RefusedError, RelayUnreachableError, RemoteProtocolError, reason_of
from tunneld.net.accept import local_address, peer_address
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import CONTROL_PROTOCOL, PEER_CLOSED
from tunneld.tls.contexts import client_tls_context
from tunneld.wire.lines import Err, parse_reply

MAX_PLAIN_REFUSAL = 1024
"""Bytes of a refusal in plain text on a port with TLS: one line, and the relay's own are below 200."""


async def dial_relay(endpoint: Endpoint, tls: ssl.SSLContext | None, timeout: float) -> Stream:
    failure = f"could not reach relay {endpoint}"
    try:
        with trio.fail_after(timeout):
            transport = await trio.open_tcp_stream(endpoint.host, endpoint.port)
        if endpoint.scheme == "tcp":
            return transport
        failure = f"TLS handshake with relay {endpoint} failed"
        with trio.fail_after(timeout):
            return await _encrypt(transport, tls or client_tls_context(), endpoint)
    except trio.TooSlowError:
        reason = f"no answer in {timeout:g} s"
    except OSError as error:
        reason = _system_reason(error)
    except trio.BrokenResourceError as error:
        reason = why(error)
        if reason == PEER_CLOSED or isinstance(error.__cause__, ConnectionResetError):
            reason = "the relay closed the connection; after failed logins it blocks the address for a while"
    raise RelayUnreachableError(f"{failure}: {reason}")


class RecordedTransport(trio.abc.Stream):
    """The TCP connection below TLS. It keeps the first bytes that the relay sent: a relay that refuses a connection
    says so in plain text, without a handshake.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket
        self.first = b""
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        data = await self._stream.receive_some(max_bytes)
        self.first = self.first or bytes(data[:MAX_PLAIN_REFUSAL])
        return data

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await self._stream.aclose()

    def refusal(self) -> str:
        """The text of a refusal in plain text; empty if the relay sent anything else."""
        if not self.first.startswith(b"ERR "):
            return ""
        try:
            line = parse_reply(self.first.partition(b"\n")[0])
        except RemoteProtocolError:
            return ""
        return line.text if isinstance(line, Err) and line.code == LimitReachedError.code else ""


Stream = trio.SocketStream | trio.SSLStream[RecordedTransport]


async def _encrypt(
    connection: trio.SocketStream, tls: ssl.SSLContext, endpoint: Endpoint
) -> trio.SSLStream[RecordedTransport]:
    """Do the TLS handshake. Raises `trio.BrokenResourceError`, or `RefusedError` if the relay says why it refuses."""
    transport = RecordedTransport(connection)
    tls.set_alpn_protocols([CONTROL_PROTOCOL])  # the port may be the relay's HTTPS port
    stream = trio.SSLStream(transport, tls, server_hostname=endpoint.host)
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError:
        await trio.aclose_forcefully(transport)
        if reason := transport.refusal():
            message = f"relay {endpoint} refused the connection, in plain text: {reason}"
            raise RefusedError(LimitReachedError.code, message) from None
        raise
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    return stream


def _system_reason(error: OSError) -> str:
    """The operating system's reason. Trio wraps it twice: with the address, and in "all attempts failed"."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    found = cause if isinstance(cause, OSError) else error
    number = found.errno or 0  # negative if from getaddrinfo
    return reason_of(OSError(number, os.strerror(number)) if number > 0 else found)


def addresses_of(stream: Stream) -> tuple[str, str]:
    """The local address of a connection and the relay's."""
    socket = (stream if isinstance(stream, trio.SocketStream) else stream.transport_stream).socket
    try:
        return local_address(socket)[0], peer_address(socket)[0]
    except OSError:
        return "", ""  # the connection broke after the greeting; the next call raises the reason
