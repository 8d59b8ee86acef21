"""Access to a site: what is read from a request, which answer it gets, and what is remembered. Pure.

Decisions that take time, such as the check of a password, are in `guard`.
"""

from __future__ import annotations

import binascii
import hmac
import secrets
from base64 import b64decode
from collections.abc import Callable
from typing import Generic, TypeVar

from tunneld.net.endpoint import Peer
from tunneld.policy.networks import read_address
from tunneld.sites.pages import error_page, redirect
from tunneld.sites.site import Request
from tunneld.wire.http1 import Fields

MAX_REMEMBERED = 1024
"""Digests in each cache of a site, at about 150 bytes each: users, and what guesses a source has made."""

Value = TypeVar("Value")


def field_values(fields: Fields, name: bytes) -> list[bytes]:
    """The values of all fields with this name, in lower case."""
    return [value for key, value in fields if len(key) == len(name) and key.lower() == name]


def basic_login(value: bytes) -> tuple[str, str] | None:
    """The user name and the password in an Authorization field of the scheme Basic (RFC 7617)."""
    scheme, _, encoded = value.partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        text = b64decode(encoded.strip(), validate=True).decode("utf-8", "surrogateescape")
    except binascii.Error:
        return None
    user, colon, password = text.partition(":")
    return (user, password) if colon else None


def source_of(client: Peer) -> int:
    """The source of a visitor: its IPv4 address or IPv6 /64."""
    return read_address(client[0]).source


def refused(request: Request, status: int, *extra: tuple[bytes, bytes]) -> bytes:
    """The relay's answer to a request that may not pass."""
    return error_page(status, request.head, request.identity, keep_alive=request.keep_alive, extra=extra)


def moved(request: Request, location: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """303: the same page under another address."""
    return redirect(303, request.head, location, request.identity, keep_alive=request.keep_alive, extra=extra)


def login_required(request: Request, realm: str) -> bytes:
    """401: browsers ask for a user name and a password."""
    challenge = f'Basic realm="{realm}", charset="UTF-8"'.encode()
    return refused(request, 401, (b"WWW-Authenticate", challenge))


def too_many(request: Request, seconds: float) -> bytes:
    """429, with the time after which another attempt makes sense."""
    return refused(request, 429, (b"Retry-After", b"%d" % max(1, round(seconds))))


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
