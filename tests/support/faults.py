"""A Trio stream that fails in a planned way, for tests of relays between streams."""

from __future__ import annotations

from dataclasses import dataclass

import trio
from trio.abc import HalfCloseableStream


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of a stream; by default none."""

    step: int | None = None
    "The largest number of bytes to receive or send at a time."
    stall_at: int | None = None
    "Stop receiving, or sending, after this many bytes."
    cut_at: int | None = None
    "Break the stream after this many bytes in one direction."


class FaultyStream(HalfCloseableStream):
    """A stream around another one, with planned faults."""

    def __init__(self, inner: HalfCloseableStream, plan: Plan) -> None:
        self._inner = inner
        self._plan = plan
        self._received = 0
        self._sent = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive at most as much as the plan permits."""
        most = await self._allowed(self._received, max_bytes or 65536)
        data = bytes(await self._inner.receive_some(most))
        self._received += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send in parts, as far as the plan permits."""
        rest = memoryview(data)
        while rest:
            most = await self._allowed(self._sent, len(rest))
            await self._inner.send_all(rest[:most])
            self._sent += min(most, len(rest))
            rest = rest[most:]

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._allowed(self._sent, 1)
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _allowed(self, passed: int, wanted: int) -> int:
        """Return how many of the wanted bytes may pass now; does not return during a stall."""
        plan = self._plan
        limits = [wanted]
        if plan.step is not None:
            limits.append(plan.step)
        if plan.stall_at is not None:
            if passed >= plan.stall_at:
                await trio.sleep_forever()
            limits.append(plan.stall_at - passed)
        if plan.cut_at is not None:
            if passed >= plan.cut_at:
                await trio.aclose_forcefully(self._inner)
                raise trio.BrokenResourceError("cut as planned")
            limits.append(plan.cut_at - passed)
        return min(limits)
