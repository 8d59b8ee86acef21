"""Is the peer of a carrier alive? A question now and then, where nothing else is heard.

NoOp is WebMUX's only idle message, and nobody answers one. A SYN must be answered, though, and one for a protocol that
nobody serves is answered by RST: that is the question here, a session for `PING`. (A peer whose kernel lives and whose
program hangs answers TCP's own probes, so those are not enough.)

    beat ──heard nothing for a beat──► asked ──nothing within `patience`──► silent ──two beats without a word──► dead
      ▲                                  │                                   │
      └───────────────any octet──────────┴───────────────any octet───────────┘

Whoever says something that must be answered, as a visitor's SYN must, need not wait for the beat: if nothing is heard
within `patience`, the question is asked then (`expect`). It makes a peer silent sooner, and not dead.

While the peer speaks, nobody reads a clock: an octet sets a flag. Once a beat the kernel is asked how long ago the last
one came, and the next beat is counted from there.

So a dead peer is noticed within three heartbeats, a silent one within a heartbeat and the patience, or, where somebody
wants it, within twice the patience. A *silent* one gets no new visitors where there is another carrier, its tunnel is
not ready where there is none, and its owner may dial a new one meanwhile: where the kernel cannot be told to hurry, a
connection that lost packets for a minute recovers only when TCP tries again, which by then is half a minute apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from tunneld.engine.timers import Timed
from tunneld.mux.limits import CarrierLimits

PING = 0
"""The protocol id of the question: port 0, which nobody serves."""


class TimerService(Protocol):
    """Who keeps them; `relay.timers.Timers` does."""

    def watch(self, timed: Timed) -> None:
        """Call `on_deadline` when its deadline has passed."""

    def forget(self, timed: Timed) -> None:
        """Call no more. Harmless when repeated."""


class HeartbeatTarget(Protocol):
    """What a heartbeat asks of its carrier."""

    def send_ping(self) -> bool:
        """Ask for a sign of life; whether that was possible."""

    def on_unresponsive(self) -> None:
        """The question was not answered in `CarrierLimits.patience` seconds."""

    def on_dead(self, reason: str) -> None:
        """The peer is dead."""


class Heartbeat:
    """The clock of one carrier: one deadline at a time, of those that the pump's timers keep."""

    __slots__ = (
        "_expecting",
        "_heart",
        "_known",
        "_limits",
        "_now",
        "_quiet",
        "_timers",
        "awaiting_reply",
        "deadline",
        "received",
        "unresponsive",
    )

    def __init__(
        self,
        heart: HeartbeatTarget,
        limits: CarrierLimits,
        timers: TimerService,
        quiet: Callable[[], float],
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        """Begin. `quiet` is the seconds since the peer's last octet, 0 where that is not known."""
        self.received = True  # set by the carrier at every octet; cleared at every beat
        self.awaiting_reply = False  # a question is out
        self.unresponsive = False  # and has not been answered for `patience` seconds
        self._expecting = False  # something of ours must be answered
        self._known = now()  # when something was heard, as far as we know
        self._heart = heart
        self._limits = limits
        self._timers = timers
        self._quiet = quiet
        self._now = now
        self.deadline = 0.0
        self._sleep(limits.heartbeat)

    def stop(self) -> None:
        """The carrier is gone."""
        self._timers.forget(self)

    def ping_now(self) -> None:
        """Do not wait for the beat: there is reason to doubt. Harmless while a question is out."""
        if not self.awaiting_reply:
            self._ask()

    def expect_reply(self) -> None:
        """Something was said that must be answered. Cheap to repeat."""
        if not self._expecting and (self.received or not self.awaiting_reply):
            self._expecting = True
            if self.received:
                self.received = self.awaiting_reply = self.unresponsive = False
                self._known = self._now()
            self._sleep(min(self._limits.patience, self.deadline - self._now()))

    def on_deadline(self) -> None:
        """The next step."""
        if self.received:
            self.received = self.awaiting_reply = self.unresponsive = self._expecting = False
            quiet = min(self._quiet(), self._limits.heartbeat)
            self._known = self._now() - quiet
            self._sleep(self._limits.heartbeat - quiet)
        elif self.unresponsive:
            self._heart.on_dead(f"it did not answer for {self._limits.heartbeat:g} s (heartbeat)")
        elif self.awaiting_reply:
            self.unresponsive = True
            beat = self._limits.heartbeat
            self._sleep(max(self._known + 2 * beat - self._now(), beat - self._limits.patience, 0))
            self._heart.on_unresponsive()
        else:
            self._ask()

    def _ask(self) -> None:
        """Where no session id is free there is much going on: look again at the next beat."""
        self.awaiting_reply = self._heart.send_ping()
        self.received = False
        self._sleep(self._limits.patience if self.awaiting_reply else self._limits.heartbeat)

    def _sleep(self, seconds: float) -> None:
        self.deadline = self._now() + seconds
        self._timers.watch(self)
