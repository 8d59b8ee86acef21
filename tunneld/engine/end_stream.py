"""An end as a Trio stream, for code that does not relay. (A Trio stream as an end is a `StreamEnd`.)"""

from __future__ import annotations

import operator

import trio

from tunneld.engine.end import BufferedEnd

MAX_RECEIVE_BYTES = 65536
"""Bytes returned by one `receive_some`, unless the caller asks for fewer."""


class EndStream(trio.abc.HalfCloseableStream):
    """A Trio stream over an end. It owns the end; flow control, end of file and resets are the end's."""

    def __init__(self, end: BufferedEnd) -> None:
        self._end = end
        self._readable = trio.Event()
        self._writable = trio.Event()
        self._error: OSError | None = None
        self._closed = False
        self._send_guard = _ExclusiveUse("another task is sending on this stream")
        self._receive_guard = _ExclusiveUse("another task is receiving from this stream")
        self._eof_sent = False
        end.handler = self

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        with self._send_guard:
            await trio.lowlevel.checkpoint()
            self._check_sending()
            with memoryview(data) as view, view.cast("B") as payload:
                at = 0
                while at < len(payload):
                    capacity = await self._wait_for_capacity()
                    self._end.write(payload[at : at + capacity])
                    at += capacity

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        with self._send_guard:
            await trio.lowlevel.checkpoint()
            self._check_sending()
            await self._wait_for_capacity()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        with self._send_guard:
            await trio.lowlevel.checkpoint()
            if self._eof_sent:
                return
            self._check_sending()
            self._eof_sent = True
            self._end.finish()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        limit = MAX_RECEIVE_BYTES if max_bytes is None else operator.index(max_bytes)
        if limit < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receive_guard:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError
                buffered = self._end.buffered
                if buffered:
                    data = bytes(buffered[:limit])
                    self._end.consume(len(data))
                    return data
                if self._end.eof_received:
                    return b""
                if self._error is not None:
                    raise trio.BrokenResourceError from self._error
                self._readable = trio.Event()
                await self._readable.wait()

    async def aclose(self) -> None:
        """Close both directions as TCP does: the peer receives an end of file, or a reset if it has sent bytes that
        were not read, or sends more.
        """
        if not self._closed:
            self._closed = True
            if self._end.buffered:
                self._end.reset("closed")
            self._end.finish()
            self._wake()
        await trio.lowlevel.checkpoint()

    # The handler of the end

    def on_data(self, data: memoryview) -> int:
        """Leave everything in the end's buffer, for `receive_some`."""
        if self._closed:
            self._end.reset("closed")
        self._readable.set()
        return 0

    def on_writable(self) -> None:
        """Wake a sending task."""
        self._writable.set()

    def on_eof(self) -> None:
        """Wake a receiving task."""
        self._readable.set()

    def on_write_failed(self, error: OSError) -> None:
        """The peer takes no more: wake a sending task."""
        self._writable.set()

    def on_reset(self, error: OSError) -> None:
        """The end is gone: wake all tasks."""
        self._error = error
        self._wake()

    def on_internal_error(self, error: Exception) -> None:
        """No method of this handler raises."""
        raise error

    # Internal

    def _check_sending(self) -> None:
        if self._closed or self._eof_sent:
            raise trio.ClosedResourceError
        error = self._error or self._end.write_failure
        if error is not None or self._end.closed:
            raise trio.BrokenResourceError from error

    async def _wait_for_capacity(self) -> int:
        while not (capacity := self._end.send_capacity()):
            self._check_sending()
            self._writable = trio.Event()
            await self._writable.wait()
            self._check_sending()
        return capacity

    def _wake(self) -> None:
        self._readable.set()
        self._writable.set()


class _ExclusiveUse:
    """Lets one task in at a time; raises `trio.BusyResourceError` for a second one."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._in_use = False

    def __enter__(self) -> None:
        if self._in_use:
            raise trio.BusyResourceError(self._message)
        self._in_use = True

    def __exit__(self, *_: object) -> None:
        self._in_use = False
