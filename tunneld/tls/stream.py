"""A TLS connection as a Trio stream: for what a task serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from tunneld.tls.connection import READ_SIZE, TlsSocket


class TlsStream(trio.abc.HalfCloseableStream):
    """A `TlsSocket` after its handshake as a Trio stream, which owns it; for one reader and one writer at a time."""

    def __init__(self, tls: TlsSocket) -> None:
        self.socket = tls.connection
        self._tls = tls
        self._detached = False

    @property
    def peer_certificate(self) -> bytes | None:
        """See `TlsSession.peer_certificate`."""
        return self._tls.peer_certificate

    def detach(self) -> TlsSocket:
        """Give the connection to another owner; afterwards this stream behaves like a closed one."""
        self._detached = True
        return self._tls

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        with _trio_errors():
            await self._tls.send_all(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        with _trio_errors():
            await self._tls.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        await trio.lowlevel.checkpoint()
        with _trio_errors():
            return await self._tls.receive(max_bytes or READ_SIZE)

    async def aclose(self) -> None:
        """Close the connection. A close_notify is sent if the kernel accepts it at once."""
        if self.socket.fileno() != -1 and not self._detached:
            self._tls.finish()
            self._tls.flush_if_possible()
            trio.lowlevel.notify_closing(self.socket)
            self._tls.close()
        await trio.lowlevel.checkpoint()


@contextmanager
def _trio_errors() -> Iterator[None]:
    """Raise the errors that Trio's streams raise."""
    try:
        yield
    except OSError as error:
        raise trio.BrokenResourceError(str(error)) from error
