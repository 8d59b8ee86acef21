"""The interface between the table of commands and the services that receive requests: the control port and HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Self, TypeVar, overload

import trio

from tunneld.directory.requester import Requester
from tunneld.wire.lines import Item, Request

ITEMS_PER_SLICE = 16
"""Items of a reply that are made and encoded before other tasks run: one to two milliseconds for tunnels."""

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


class InSlices(Generic[T]):
    """An asynchronous iterator over lists of a few things each. Other tasks run between two lists, so that a long reply
    holds up nothing.
    """

    def __init__(self, things: Iterable[T]) -> None:
        self._things = iter(things)
        self._has_begun = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[T]:
        if self._has_begun:
            await trio.lowlevel.checkpoint()
        self._has_begun = True
        part = list(islice(self._things, ITEMS_PER_SLICE))
        if not part:
            raise StopAsyncIteration
        return part


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to a request that succeeded: the items, then the items of the stream, if there is one, then `text`.

    The service that sends the reply owns `stream`: it ends it when the client has had enough, and closes it (`aclose`)
    even if it took nothing from it. After a reply with `closing`, it closes the connection.
    """

    text: str = ""
    items: Sequence[Item] = ()
    stream: AsyncGenerator[Item, None] | None = None
    closing: bool = False


Execute = Callable[[Request, Requester], Awaitable[Reply]]
"""Executes one request of a requester. Raises a `TunneldError` if it is refused or fails; any other exception is a bug.

`commands.executor` makes one for the daemon; tests have their own.
"""
