"""What the faces of the control protocol and the table of commands say to each other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from tunneld.directory.service import AtEnd, at_once
from tunneld.policy.access import Grant
from tunneld.wire.lines import Item, Request


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    `host` is the address of the peer without its port, `owner` is what `list` shows (`203.0.113.5:41234`, behind the
    name of a credential and an @ where it has one), `local_host` is our address on which the request came in: the one
    that this caller can reach us at. `grant` is what it may do; None for somebody who has not authenticated.
    """

    host: str
    owner: str
    local_host: str
    grant: Grant | None
    renew: Callable[[], Grant | None] | None = None  # what it may do at another time; None: always the same
    at_end: AtEnd = at_once  # of its connection

    @property
    def grant_now(self) -> Grant | None:
        """What it may do by now, for what takes long: its credential may be gone, or be another's that may do less."""
        return self.grant if self.renew is None else self.renew()


@dataclass(frozen=True, slots=True)
class Reply:
    """A request that went well: the items first, then the stream, if any, until the caller has enough of it, then
    `text`.

    `stream` is closed (`aclose`) by the face that sends it, also when nothing was taken from it. After `closing` the
    face hangs up.
    """

    text: str = ""
    items: Sequence[Item] = ()
    stream: AsyncGenerator[Item, None] | None = None
    closing: bool = False


Execute = Callable[[Request, Caller], Awaitable[Reply]]
"""Carries out one request. Raises a `TunneldError` where it cannot; any other exception is a bug."""
