"""Keys of server URIs: on a port that many tunnels share, a hidden server presents the key of its tunnel.

A key is valid for the scheme with which it was handed out. One that crossed the network in clear is never accepted in
TLS, where a hidden server counts as authenticated by its key wherever it connects from.
"""

from __future__ import annotations

import secrets
from typing import Protocol

from tunneld.errors import UsageError
from tunneld.net.endpoint import Endpoint

KEY_BYTES = 18
"""Random bytes of a key, 24 characters: too many to guess."""


class Keyed(Protocol):
    """A server side behind a shared port."""

    key: str
    """The key of its server URI, which the registry replaces when the scheme changes."""

    @property
    def backend(self) -> str:
        """The name of its backend. A hidden server of another backend does not find it."""


class KeyRegistry:
    """Maps each key to its server side, and each backend to the shared port in its URIs."""

    def __init__(self) -> None:
        self._ports: dict[str, tuple[str, int]] = {}  # by backend: the scheme of its URIs, and its port
        self._sides: dict[str, Keyed] = {}  # by key
        self._closing: dict[str, list[Keyed]] = {}  # by key: closed, but their connections may come back

    def set_port(self, backend: str, scheme: str, port: int) -> None:
        """Set the shared port of a backend; the server URIs of all its tunnels follow. 0: it has none any more.

        With another scheme, all of its tunnels get new keys. Their connections stay.
        """
        former = self.scheme(backend)
        self._ports[backend] = scheme, port
        if former != scheme:
            for side in [side for side in self._sides.values() if side.backend == backend]:
                del self._sides[side.key]
                side.key = _new_key()
                self._sides[side.key] = side

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

    def choose(self, backend: str, key: str = "", scheme: str = "", taken_over: str = "") -> str:
        """The key for a new server side: `key`, which it had before in a server URI with this `scheme`, if the scheme
        is the same, and the key is free or that of the tunnel that is replaced (`taken_over`); otherwise a new one.
        """
        is_free = key not in self._sides or key == taken_over
        return key if key and is_free and scheme == self.scheme(backend) and not key.startswith("-") else _new_key()

    def register(self, side: Keyed) -> None:
        """Register a server side with its key, in place of the one that it replaces."""
        self._sides[side.key] = side

    def unregister(self, side: Keyed) -> None:
        """Remove a server side that has closed. Idempotent, and harmless once a successor has the key."""
        if self._sides.get(side.key) is side:
            del self._sides[side.key]

    def find(self, key: str) -> Keyed | None:
        """The server side with this key."""
        return self._sides.get(key)

    def find_all(self, key: str) -> list[Keyed]:
        """Those with this key to which `keep` applies, and last the one that is open."""
        side = self._sides.get(key)
        return [*self._closing.get(key, ()), *([] if side is None else [side])]

    def keep(self, side: Keyed) -> None:
        """A server side has closed, but its visitors need connections that may be lost and come back."""
        self._closing.setdefault(side.key, []).append(side)

    def forget(self, side: Keyed) -> None:
        """`keep` applies no more. Idempotent."""
        kept = self._closing.get(side.key, [])
        if side in kept:
            kept.remove(side)
        if not kept:
            self._closing.pop(side.key, None)


def _new_key() -> str:
    """A random key that ssh does not take for an option where it is the user name."""
    while (key := secrets.token_urlsafe(KEY_BYTES)).startswith("-"):
        pass
    return key
