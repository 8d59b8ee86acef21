"""Keep-alive of a carrier: if nothing arrives for a while, the peer is pinged, and given up if it does not answer.

TCP's own keep-alive is not enough: the kernel still answers it when the peer's program hangs. (WebMUX's NoOp
is no help either, since it has no answer; see `ping` for what is sent instead.)

    idle ──nothing for a heartbeat──► pinged ──nothing within `patience`──► unresponsive ──two heartbeats──► dead
      ▲                                  │                                       │
      └─────────────any byte─────────────┴────────────────any byte───────────────┘

After a message that the peer must answer, such as a visitor's SYN, the ping does not wait for the heartbeat: if nothing
arrives within `patience`, it is sent then (`expect_reply`). That makes a peer unresponsive sooner, but not dead.

While the peer sends, no clock is read: a byte sets a flag. Once per heartbeat the kernel is asked how long ago the last
byte came, and the next heartbeat is counted from there.

So a dead peer is detected within three heartbeats, an unresponsive one within a heartbeat plus the patience, or, if a
reply is expected, within twice the patience. An *unresponsive* peer gets no new visitors if there is another carrier,
its tunnel is not ready if there is none, and its owner may dial a new connection meanwhile: if the kernel's
retransmission interval cannot be limited, a connection that lost packets for a minute recovers only at TCP's next
retransmission, half a minute later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from tunneld.engine.timers import Timed
from tunneld.mux.limits import CarrierLimits


class TimerService(Protocol):
    """Keeps deadlines; `tunneld.engine.timers.Timers` is one."""

    def watch(self, timed: Timed) -> None:
        """Call `timed.on_deadline` once its deadline has passed."""

    def forget(self, timed: Timed) -> None:
        """Cancel `watch`. Harmless when repeated."""


class HeartbeatTarget(Protocol):
    """The carrier, as its heartbeat calls it."""

    def send_ping(self) -> bool:
        """Send a message that the peer must answer. Returns whether that was possible."""

    def on_unresponsive(self) -> None:
        """The ping was not answered within `CarrierLimits.patience` seconds."""

    def on_dead(self, reason: str) -> None:
        """Nothing arrived for two heartbeats: give the peer up."""


class Heartbeat:
    """The keep-alive timer of one carrier. It has one deadline at a time, in the pump's timers."""

    __slots__ = (
        "_expecting",
        "_idle_seconds",
        "_last_heard",
        "_limits",
        "_now",
        "_target",
        "_timers",
        "awaiting_reply",
        "deadline",
        "received",
        "unresponsive",
    )

    def __init__(
        self,
        target: HeartbeatTarget,
        limits: CarrierLimits,
        timers: TimerService,
        idle_seconds: Callable[[], float],
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        """Start. `idle_seconds` returns the time since the peer's last byte, 0 if unknown."""
        self.received = True  # set by the carrier at every byte, cleared at every heartbeat
        self.awaiting_reply = False  # a ping is outstanding
        self.unresponsive = False  # and has not been answered for `patience` seconds
        self._expecting = False  # a message was sent that the peer must answer
        self._last_heard = now()  # a lower bound
        self._target = target
        self._limits = limits
        self._timers = timers
        self._idle_seconds = idle_seconds
        self._now = now
        self.deadline = 0.0
        self._sleep(limits.heartbeat)

    def stop(self) -> None:
        """Cancel the timer; the carrier is closed. Harmless when repeated."""
        self._timers.forget(self)

    def ping_now(self) -> None:
        """Ping without waiting for the heartbeat, for a caller that doubts the connection. Does nothing while a ping is
        outstanding.
        """
        if not self.awaiting_reply:
            self._ping()

    def expect_reply(self) -> None:
        """A message was sent that the peer must answer. Cheap to repeat."""
        if not self._expecting and (self.received or not self.awaiting_reply):
            self._expecting = True
            if self.received:
                self.received = self.awaiting_reply = self.unresponsive = False
                self._last_heard = self._now()
            self._sleep(min(self._limits.patience, self.deadline - self._now()))

    def on_deadline(self) -> None:
        """Called by the timers: go to the next state."""
        if self.received:
            self.received = self.awaiting_reply = self.unresponsive = self._expecting = False
            idle = min(self._idle_seconds(), self._limits.heartbeat)
            self._last_heard = self._now() - idle
            self._sleep(self._limits.heartbeat - idle)
        elif self.unresponsive:
            self._target.on_dead(f"no answer for {self._limits.heartbeat:g} s (heartbeat)")
        elif self.awaiting_reply:
            self.unresponsive = True
            heartbeat = self._limits.heartbeat
            rest = self._last_heard + 2 * heartbeat - self._now()
            self._sleep(max(rest, heartbeat - self._limits.patience, 0))
            self._target.on_unresponsive()
        else:
            self._ping()

    def _ping(self) -> None:
        """Ping the peer. If no session id is free, there is much traffic: look again after a heartbeat."""
        self.awaiting_reply = self._target.send_ping()
        self.received = False
        self._sleep(self._limits.patience if self.awaiting_reply else self._limits.heartbeat)

    def _sleep(self, seconds: float) -> None:
        self.deadline = self._now() + seconds
        self._timers.watch(self)
