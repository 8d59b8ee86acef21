"""A session with the host of a private tunnel, at the visitor: one connection to the relay, and many streams in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from tunneld.agent.network import is_local_address
from tunneld.agent.private_carrier import STREAM_PROTOCOL, PrivateCarrier
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.mux.channel import Channel

FINISH_TIMEOUT = 3.0
"""Seconds for the host to read what was sent, before a session is closed."""


def _ignore(_session: VisitSession) -> None:
    """Nothing listens."""


class VisitSession(PrivateCarrier):
    """One session. `open` gives streams; the caller closes it."""

    def __init__(self, engine: Engine, tls: TlsOverEnd, address: Any, *, leave_tls: bool) -> None:
        """`address` is that of this machine in the connection to the relay. For `leave_tls` see `PrivateCarrier`.
        Raises OSError where `tls` is closed.
        """
        assert isinstance(engine, Pump)
        self.on_change: Callable[[VisitSession], None] = _ignore
        """Called when it has room again, has become idle, or is closed."""
        self.opened_at = trio.current_time()
        self.deadline = 0.0
        self.is_idle = False  # it is being closed because nothing used it
        self._engine = engine
        self._address = address
        self._address_lost = False  # this machine no longer has it
        self._retired = False  # the host takes no more streams
        self._settled = trio.Event()
        super().__init__(engine, tls, initiator=True, leave_tls=leave_tls)

    @property
    def usable(self) -> bool:
        """Whether a stream can be opened, as far as is known."""
        carrier = self.carrier
        return carrier.can_open and carrier.answering and not (self._retired or self._address_lost or self.is_idle)

    def open(self) -> Channel:
        """Open a stream to the local server of the host. Raises `LimitReachedError`."""
        self._engine.timers.forget(self)
        return self.carrier.open(STREAM_PROTOCOL)

    def close_when_idle(self, seconds: float) -> None:
        """Close it after this time without a stream. `open` cancels that."""
        self.deadline = trio.current_time() + seconds
        self._engine.timers.watch(self)

    def on_deadline(self) -> None:
        """It was idle for that long."""
        self.is_idle = True
        self.carrier.close("idle")

    def probe(self) -> None:
        """The network has changed, or the machine was suspended: find out whether the host still answers."""
        self._address_lost = not is_local_address(self._address)
        self.carrier.heartbeat.ping_now()

    async def finish(self) -> None:
        """Close it once the host has read everything that was sent, in bounded time even if cancelled."""
        if not self.carrier.over:
            self.carrier.request_ack()
            with trio.move_on_after(FINISH_TIMEOUT, shield=True):
                self._settled = trio.Event()
                await self._settled.wait()
        self.close("finished")

    def close(self, reason: str) -> None:
        """End it now, with all of its streams."""
        self._engine.timers.forget(self)
        self.carrier.close(reason)

    # The carrier's events

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """Refuse it: a visitor has no local server."""
        channel.reset("a visitor takes no connections")

    def on_endpoint(self, uri: str | None) -> None:
        """The host takes no more streams; the ones that there are go on."""
        self._retired = True
        self.on_change(self)

    def on_capacity(self) -> None:
        """The host has answered a stream."""
        self.on_change(self)

    def on_over(self, channel: Channel) -> None:
        """A stream has ended."""
        self.on_change(self)

    def on_pong(self) -> None:
        """The host has read everything that was sent before the ping."""
        super().on_pong()
        self._address_lost = False
        self._settled.set()

    def on_unresponsive(self) -> None:
        """Other sessions are wanted."""
        self.on_change(self)

    def on_closed(self, reason: str) -> None:
        """The session is over."""
        super().on_closed(reason)
        self._engine.timers.forget(self)
        self._settled.set()
        self.on_change(self)
