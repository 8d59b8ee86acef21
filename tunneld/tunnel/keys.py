"""Ports that many tunnels share, and who is behind them: a hidden server says by a key which tunnel it is for."""

from __future__ import annotations

import secrets
from typing import Protocol

from tunneld.errors import UsageError
from tunneld.net.endpoint import Endpoint

KEY_BYTES = 18
"""Of randomness, 24 characters: nobody guesses one."""


class Keyed(Protocol):
    """A server side behind a shared port."""

    @property
    def backend(self) -> str:
        """The name of its backend: a hidden server of another one does not find it."""


class KeyRegistry:
    """The book of all shared ports of a relay."""

    def __init__(self) -> None:
        self._ports: dict[str, tuple[str, int]] = {}  # by backend: the scheme of its URIs, and its port
        self._sides: dict[str, Keyed] = {}  # by key

    def set_port(self, backend: str, scheme: str, port: int) -> None:
        """Where the shared port of a backend is from now on; the server URIs of all its tunnels follow. 0: there is
        none any more.
        """
        self._ports[backend] = scheme, port

    def check(self, backend: str) -> None:
        """Raise `UsageError` where the backend has no port here."""
        if not self._ports.get(backend, ("", 0))[1]:
            raise UsageError(
                f"this relay has no port for the {backend} backend: enable [{backend}] there, or use another"
            )

    def scheme(self, backend: str) -> str:
        """Of a backend's server URIs now."""
        return self._ports.get(backend, (backend, 0))[0]

    def uri(self, backend: str, host: str, key: str) -> Endpoint:
        """The server URI of whoever has the key."""
        scheme, port = self._ports.get(backend, (backend, 0))
        return Endpoint(scheme, host, port, key)

    def register(self, side: Keyed, key: str = "") -> str:
        """The key of a new server side: the one it had before if nobody has that. Raises `UsageError` as `check`."""
        self.check(side.backend)
        if not key or key.startswith("-") or key in self._sides:
            key = _new_key()
        self._sides[key] = side
        return key

    def unregister(self, side: Keyed, key: str) -> None:
        """A server side has closed. Harmless when repeated, also when its successor has the key by then."""
        if self._sides.get(key) is side:
            del self._sides[key]

    def find(self, key: str) -> Keyed | None:
        """Who has the key."""
        return self._sides.get(key)


def _new_key() -> str:
    """One that no program takes for an option when it is a user's name."""
    while (key := secrets.token_urlsafe(KEY_BYTES)).startswith("-"):
        pass
    return key
