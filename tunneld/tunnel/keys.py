"""Keys of server URIs: on a port that many tunnels share, a hidden server presents the key of its tunnel."""

from __future__ import annotations

import secrets
from typing import Protocol

from tunneld.errors import UsageError
from tunneld.net.endpoint import Endpoint

KEY_BYTES = 18
"""Random bytes of a key, 24 characters: too many to guess."""


class Keyed(Protocol):
    """A server side behind a shared port."""

    @property
    def backend(self) -> str:
        """The name of its backend. A hidden server of another backend does not find it."""


class KeyRegistry:
    """Maps each key to its server side, and each backend to the shared port in its URIs."""

    def __init__(self) -> None:
        self._ports: dict[str, tuple[str, int]] = {}  # by backend: the scheme of its URIs, and its port
        self._sides: dict[str, Keyed] = {}  # by key

    def set_port(self, backend: str, scheme: str, port: int) -> None:
        """Set the shared port of a backend; the server URIs of all its tunnels follow. 0: it has none any more."""
        self._ports[backend] = scheme, port

    def check(self, backend: str) -> None:
        """Raise `UsageError` where the backend has no port on this relay."""
        if not self._ports.get(backend, ("", 0))[1]:
            raise UsageError(
                f"this relay has no port for the {backend} backend: enable [{backend}] in its configuration, or use "
                "another backend"
            )

    def scheme(self, backend: str) -> str:
        """The scheme of a backend's server URIs."""
        return self._ports.get(backend, (backend, 0))[0]

    def uri(self, backend: str, host: str, key: str) -> Endpoint:
        """The server URI with this key."""
        scheme, port = self._ports.get(backend, (backend, 0))
        return Endpoint(scheme, host, port, key)

    def choose(self, key: str = "", taken_over: str = "") -> str:
        """The key for a new server side: `key`, which it had before, if that is free or the one of the tunnel that it
        replaces (`taken_over`), otherwise a new one.
        """
        if not key or key.startswith("-") or (key in self._sides and key != taken_over):
            return _new_key()
        return key

    def register(self, side: Keyed, key: str) -> None:
        """Register a server side with the key that was chosen for it, in place of the one that it replaces."""
        self._sides[key] = side

    def unregister(self, side: Keyed, key: str) -> None:
        """Remove a server side that has closed. Idempotent, and harmless once a successor has the key."""
        if self._sides.get(key) is side:
            del self._sides[key]

    def find(self, key: str) -> Keyed | None:
        """The server side with this key."""
        return self._sides.get(key)


def _new_key() -> str:
    """A random key that ssh does not take for an option where it is the user name."""
    while (key := secrets.token_urlsafe(KEY_BYTES)).startswith("-"):
        pass
    return key
