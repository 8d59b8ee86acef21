"""The interface between the table of commands and the services that receive requests: control port, HTTP and ssh."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from tunneld.directory.requester import Requester
from tunneld.tls.connection import TlsSocket
from tunneld.wire.lines import ControlRequest, Item

Step = Callable[[], AbstractAsyncContextManager[Any]]
"""Makes the context of one piece of work for a request, see `directory.turns`."""

ITEMS_PER_STEP = 16
"""Items of a reply that are made and formatted in one step: one to two milliseconds for tunnels."""

TakeConnection = Callable[[socket.socket | TlsSocket, bytes], None]
"""Takes over a control connection, which the callee owns from then on, and the bytes that were read ahead."""

T = TypeVar("T")


class DescribedItems(Sequence[Item], Generic[T]):
    """Items that are made when they are needed, from things of which there may be thousands."""

    def __init__(self, things: Sequence[T], describe: Callable[[T], Item]) -> None:
        self._things = things
        self._describe = describe

    def __len__(self) -> int:
        return len(self._things)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return DescribedItems(self._things[index], self._describe)
        return self._describe(self._things[index])


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to a request that succeeded: the items, then the groups of items of the stream, if there is one, then
    `text`. Each piece of it is formatted inside `step()`, so that the requests of one owner take turns.

    The service that sends the reply owns `stream`: it ends it when the client has had enough, and closes it (`aclose`)
    even if it took nothing from it. After a reply with `closing`, it closes the connection. A reply with `take` is not
    sent at all: the callee answers, on the connection that it takes over. Only a requester that `can_hand_over` its
    connection gets one.
    """

    text: str = ""
    items: Sequence[Item] = ()
    stream: AsyncGenerator[Sequence[Item], None] | None = None
    closing: bool = False
    take: TakeConnection | None = None
    step: Step = nullcontext


Execute = Callable[[ControlRequest, Requester], Awaitable[Reply]]
"""Executes one request of a requester. Raises a `TunneldError` if it is refused or fails; any other exception is a bug.

`control.commands.executor` makes one for the daemon; tests have their own.
"""
