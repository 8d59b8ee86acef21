"""The state of one exposure as its views show it, from the events of the agent; and the rates of its traffic. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from datetime import datetime

import trio

from tunneld.agent.events import Field
from tunneld.cli.styled import GREEN, PLAIN, RED, YELLOW, Span

RATE_WINDOW = 3.0
"""Seconds over which a rate is taken: shorter, and figures jump; longer, and they are late."""


class RateMeter:
    """Bytes per second in both directions, from counters that are read now and then."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int, int]] = deque()

    def read(self, now: float, up: int, down: int) -> tuple[int, int]:
        """Take a reading; returns the rates since the first one in the window."""
        while len(self._readings) > 1 and self._readings[1][0] <= now - RATE_WINDOW:
            self._readings.popleft()
        then, up_then, down_then = self._readings[0] if self._readings else (now, up, down)
        if not self._readings or now > self._readings[-1][0]:
            self._readings.append((now, up, down))
        elapsed = now - then
        if elapsed <= 0:
            return 0, 0
        return int(max(0, up - up_then) / elapsed), int(max(0, down - down_then) / elapsed)


class ExposureState:
    """Connected since when, or not connected and why."""

    def __init__(self) -> None:
        self.since = ""
        """The local time at which the agent connected; "" while it is not connected."""
        self.unhealthy = ""
        """What the last failed health check said."""
        self._retry_at = 0.0  # in `trio.current_time`
        self._reason = ""  # why it is not connected
        self._stop_at: float | None = None  # in `trio.current_time`; not None while stopping

    def update(self, event: str, fields: Mapping[str, Field]) -> None:
        """Apply an event of the agent."""
        match event:
            case "opened" | "resumed":
                self.since = datetime.now().astimezone().strftime("%H:%M")
            case "reconnecting":
                self.since, self._reason = "", str(fields["reason"])
                self._retry_at = trio.current_time() + float(fields["delay"])
            case "draining":
                self._stop_at = trio.current_time() + float(fields.get("delay", math.inf))
            case "unhealthy":
                self.unhealthy = str(fields["reason"])
            case "healthy":
                self.unhealthy = ""

    def describe(self, now: float) -> Span:
        """`connected since 14:03`, `reconnecting in 4 s: REASON`, ..."""
        if self._stop_at is not None:
            rest = "" if math.isinf(self._stop_at) else f", disconnecting in {max(0, round(self._stop_at - now))} s"
            return f"stopping{rest}", YELLOW
        if self.since:
            return f"connected since {self.since}", GREEN
        if not self._reason:
            return "connecting", PLAIN
        wait = round(self._retry_at - now)
        return f"reconnecting {f'in {wait} s' if wait > 0 else 'now'}: {self._reason}", RED

    @property
    def is_stopping(self) -> bool:
        """Whether the last visitors may finish."""
        return self._stop_at is not None

    @property
    def is_settled(self) -> bool:
        """Whether the description is short, and traffic can be shown beside it."""
        return bool(self.since) or self._stop_at is not None
