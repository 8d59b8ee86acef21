"""What the faces of the control protocol and the table of commands say to each other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from tunneld.directory.requester import Requester
from tunneld.wire.lines import Item, Request


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


Execute = Callable[[Request, Requester], Awaitable[Reply]]
"""Carries out one request. Raises a `TunneldError` where it cannot; any other exception is a bug."""
