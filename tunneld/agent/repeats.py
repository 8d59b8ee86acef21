"""Saying the same thing once, and later how often it was true. Pure."""

from __future__ import annotations

from collections.abc import Hashable

EVERY = 5.0
"""Seconds between two reports of the same failure: it is seen to last, and the rest can be read."""
MAX_MESSAGES = 100
"""Kinds of failure remembered. Reasons come from a short list; this only bounds what a strange one can cost."""


class RepeatLimiter:
    """Which of many like reports to let through."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self._seen: dict[Hashable, tuple[float, int]] = {}  # when it was last let through, how many were not since

    def admit(self, kind: Hashable, now: float) -> int | None:
        """None: keep this one to yourself. Otherwise the number of like ones that were kept back since the last."""
        last, kept_back = self._seen.get(kind, (-self._every, 0))
        if now - last < self._every:
            self._seen[kind] = (last, kept_back + 1)
            return None
        if len(self._seen) >= MAX_MESSAGES:
            self._seen.clear()
        self._seen[kind] = (now, 0)
        return kept_back
