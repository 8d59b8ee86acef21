"""Decisions that hold for a while, in a bounded memory. Pure: time is an argument."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from typing import Generic, TypeVar

MAX_REMEMBERED = 1024
"""Digests in each cache of a site, at about 150 bytes each: users, and what guesses a source has made."""

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """Decisions about secrets, for a while. A secret is kept as a digest with a key of this process, so neither a look
    at the memory nor the time of a look-up tells anything about it.
    """

    def __init__(self, seconds: Callable[[], float], max_entries: int = MAX_REMEMBERED) -> None:
        """`seconds` is how long a decision holds; 0: none is kept."""
        self._seconds = seconds
        self._max_entries = max_entries
        self._key = secrets.token_bytes(32)
        self._entries: dict[bytes, tuple[float, Value]] = {}  # by digest: until when it holds; oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def digest(self, *parts: bytes) -> bytes:
        """The key under which a decision about `parts` is kept."""
        sized = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, sized, "sha256")

    def get(self, digest: bytes, now: float) -> Value | None:
        """The decision, if it still holds."""
        found = self._entries.get(digest)
        if found is None or found[0] <= now:
            return None
        return found[1]

    def put(self, digest: bytes, value: Value, now: float) -> None:
        """Remember a decision; where there are too many, the oldest one is forgotten."""
        self._entries.pop(digest, None)
        if (seconds := self._seconds()) <= 0:
            return
        while len(self._entries) >= self._max_entries:
            del self._entries[next(iter(self._entries))]
        self._entries[digest] = (now + seconds, value)
