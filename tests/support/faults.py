"""A Trio stream that goes wrong in a planned way, for everything that relays between streams."""

from __future__ import annotations

from dataclasses import dataclass

import trio
from trio.abc import HalfCloseableStream


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wrong with a stream. The default is nothing."""

    step: int | None = None
    "Receive and send no more than so many bytes at a time."
    stall_at: int | None = None
    "Neither receive nor send anything after so many bytes of each."
    cut_at: int | None = None
    "Break for good, in both directions, after so many bytes of either."


class FaultyStream(HalfCloseableStream):
    """A stream around another; it counts what passes and carries out its plan."""

    def __init__(self, inner: HalfCloseableStream, plan: Plan) -> None:
        self._inner = inner
        self._plan = plan
        self._received = 0
        self._sent = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At most what the plan still allows."""
        most = await self._allowed(self._received, max_bytes or 65536)
        data = bytes(await self._inner.receive_some(most))
        self._received += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Piece by piece, as far as the plan allows."""
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
        """How many of the wanted bytes may pass now; it never returns from a stall."""
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
