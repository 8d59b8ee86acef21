"""The peer that makes a control request, over any interface: the line protocol, HTTP, an ssh connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunneld.errors import LocalProtocolError
from tunneld.policy.access import EVERYBODY, Grant

AtEnd = Callable[[str, Callable[[], None]], None]
"""Registers a callback for the end of a connection, under a key: of two with the same key only the later is called."""


def call_now(_key: str, callback: Callable[[], None]) -> None:
    """The `AtEnd` of a requester without a lasting connection, such as an HTTP request."""
    callback()


def account_of(owner: str) -> str:
    """The credential in the `owner` of a requester, or the address of one that has none: what limits count by."""
    credential, at, place = owner.rpartition("@")
    return credential if at else place.rpartition(":")[0] or place


@dataclass(frozen=True, slots=True)
class Requester:
    """The peer that makes a control request.

    `host` is its address without the port, `owner` what `list` shows (`203.0.113.5:41234`, after the name of a
    credential and an @ where it has one), and `local_host` the address of this machine that it connected to: advertised
    where none is configured. `grant` is what it may do; None: it has not authenticated.
    """

    host: str
    owner: str
    local_host: str
    grant: Grant | None = EVERYBODY
    renew: Callable[[], Grant | None] | None = None  # returns its grant at a later time; None: it never changes
    at_end: AtEnd = call_now  # of its connection
    can_hand_over: bool = False  # its connection can become something else, see `Reply.take`
    port: int = 0  # of its address; 0: unknown

    @property
    def grant_now(self) -> Grant | None:
        """Its grant at this moment, for requests that take long: the credential may have been removed or changed."""
        return self.grant if self.renew is None else self.renew()

    @property
    def known_grant(self) -> Grant:
        """The grant of an authenticated requester. Raises `LocalProtocolError`, a bug: its role was not checked."""
        if self.grant is None:
            raise LocalProtocolError("an unauthenticated request passed the check of roles")
        return self.grant
