"""What is known of a connection before its requests say anything, and where they find it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from starlette.types import Scope

from tunneld.control.strangers import Stranger

GUEST = "tunneld.guest"
"""The key in the state of an ASGI scope."""


@dataclass(slots=True)
class Guest:
    """Who is at the other end: a stranger, until a request of theirs has shown a credential."""

    stranger: Stranger = field(default_factory=Stranger.mark_authenticated)
    certificate: bytes | None = None  # in DER, which TLS has verified
    deadline: float = math.inf  # in Trio's time, for the head of the first request


def guest_of(scope: Scope) -> Guest:
    """The guest whose request this is."""
    guest: Guest = scope.get("state", {}).get(GUEST) or Guest()
    return guest
