"""A channel as a Trio stream, for whatever is not a kernel socket."""

from __future__ import annotations

import operator

import trio

from tunneld.engine.end import End

CHUNK = 65536
"""Octets returned by one `receive_some`, unless the caller asks for fewer."""


class EndStream(trio.abc.HalfCloseableStream):
    """One channel; it owns it from now on. Flow control, ends and resets are the channel's."""

    def __init__(self, channel: End) -> None:
        self._channel = channel
        self._arrived = trio.Event()
        self._room = trio.Event()
        self._error: OSError | None = None
        self._closed = False
        self._send_guard = _Guard("another task is sending on this stream")
        self._receive_guard = _Guard("another task is receiving from this stream")
        self._sent_end = False
        channel.handler = self

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        with self._send_guard:
            await trio.lowlevel.checkpoint()
            self._check_sending()
            with memoryview(data) as view, view.cast("B") as octets:
                at = 0
                while at < len(octets):
                    room = await self._wait_for_room()
                    self._channel.write(octets[at : at + room])
                    at += room

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        with self._send_guard:
            await trio.lowlevel.checkpoint()
            self._check_sending()
            await self._wait_for_room()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        with self._send_guard:
            await trio.lowlevel.checkpoint()
            if self._sent_end:
                return
            self._check_sending()
            self._sent_end = True
            self._channel.finish()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        most = CHUNK if max_bytes is None else operator.index(max_bytes)
        if most < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receive_guard:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError
                held = self._channel.buffered
                if held:
                    data = bytes(held[:most])
                    self._channel.consume(len(data))
                    return data
                if self._channel.eof_received:
                    return b""
                if self._error is not None:
                    raise trio.BrokenResourceError from self._error
                self._arrived = trio.Event()
                await self._arrived.wait()

    async def aclose(self) -> None:
        """Close both directions, as TCP does: the peer hears our end; if it has said or says more, of a reset."""
        if not self._closed:
            self._closed = True
            if self._channel.buffered:
                self._channel.reset("closed")
            self._channel.finish()
            self._wake()
        await trio.lowlevel.checkpoint()

    # The channel's user

    def on_data(self, data: memoryview) -> int:
        """Everything is held, until a task takes it."""
        if self._closed:
            self._channel.reset("closed")
        self._arrived.set()
        return 0

    def on_writable(self) -> None:
        """There may be room."""
        self._room.set()

    def on_eof(self) -> None:
        """The peer's end."""
        self._arrived.set()

    def on_reset(self, error: OSError) -> None:
        """The channel is gone."""
        self._error = error
        self._wake()

    def on_internal_error(self, error: Exception) -> None:
        """No callback here raises."""
        raise error

    # Inside

    def _check_sending(self) -> None:
        if self._closed or self._sent_end:
            raise trio.ClosedResourceError
        if self._error is not None or self._channel.closed:
            raise trio.BrokenResourceError from self._error

    async def _wait_for_room(self) -> int:
        while not (room := self._channel.send_capacity()):
            self._check_sending()
            self._room = trio.Event()
            await self._room.wait()
            self._check_sending()
        return room

    def _wake(self) -> None:
        self._arrived.set()
        self._room.set()


class _Guard:
    """Lets one task in at a time. Raises `trio.BusyResourceError` for a second."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._taken = False

    def __enter__(self) -> None:
        if self._taken:
            raise trio.BusyResourceError(self._message)
        self._taken = True

    def __exit__(self, *_: object) -> None:
        self._taken = False
