"""What is known of a connection before its requests say anything, and where they find it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from starlette.types import Scope

from tunneld.control.strangers import PreauthSlot

GUEST = "tunneld.guest"
"""The key in the state of an ASGI scope."""


@dataclass(slots=True)
class ConnectionInfo:
    """Who is at the other end: a stranger, until a request of theirs has shown a credential."""

    stranger: PreauthSlot = field(default_factory=PreauthSlot.mark_authenticated)
    certificate: bytes | None = None  # in DER, which TLS has verified
    deadline: float = math.inf  # in Trio's time, for the head of the first request


def connection_info(scope: Scope) -> ConnectionInfo:
    """The guest whose request this is."""
    guest: ConnectionInfo = scope.get("state", {}).get(GUEST) or ConnectionInfo()
    return guest
