"""The state of one exposure as its views show it, from the events of the agent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

import trio

from tunneld.agent.events import Field
from tunneld.cli.styled import GREEN, PLAIN, RED, YELLOW, Span


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
