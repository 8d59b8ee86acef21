"""The line of visitors who wait for a way to the hidden server."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tunneld.backends.queue import WaitQueue


class Standing:
    """Somebody in line, in a task of its own."""

    def __init__(self, line: WaitQueue[str], nursery: trio.Nursery) -> None:
        self.way = ""
        self.sent_away = self.left = False
        self.scope = trio.CancelScope()
        self._line = line
        nursery.start_soon(self._stand)

    async def _stand(self) -> None:
        with self.scope:
            try:
                self.way = await self._line.wait()
            except trio.ClosedResourceError:
                self.sent_away = True
        self.left = self.scope.cancelled_caught


@pytest.fixture
def line() -> WaitQueue[str]:
    return WaitQueue()


async def three(line: WaitQueue[str], nursery: trio.Nursery) -> list[Standing]:
    """Three in line, one after another."""
    standing = []
    for _ in range(3):
        standing.append(Standing(line, nursery))
        await wait_all_tasks_blocked()
    return standing


async def test_whoever_came_first_is_served_first(line: WaitQueue[str], nursery: trio.Nursery) -> None:
    standing = await three(line, nursery)
    for way in ("a", "b"):
        line.serve(way)
    await wait_all_tasks_blocked()
    assert [one.way for one in standing] == ["a", "b", ""]
    line.serve("c")
    assert not line.waiters


async def test_who_leaves_is_passed_over(line: WaitQueue[str], nursery: trio.Nursery) -> None:
    standing = await three(line, nursery)
    standing[1].scope.cancel()
    await wait_all_tasks_blocked()
    assert standing[1].left
    for way in ("a", "b"):
        line.serve(way)
    await wait_all_tasks_blocked()
    assert [one.way for one in standing] == ["a", "", "b"]


async def test_who_leaves_in_the_moment_in_which_it_is_served_takes_its_way(
    line: WaitQueue[str], nursery: trio.Nursery
) -> None:
    standing = await three(line, nursery)
    line.serve("a")
    standing[0].scope.cancel()
    await wait_all_tasks_blocked()
    assert (standing[0].way, standing[0].left) == ("a", False)
    assert len(line.waiters) == 2


async def test_a_way_that_comes_in_the_moment_in_which_the_first_leaves_is_not_lost(
    line: WaitQueue[str], nursery: trio.Nursery
) -> None:
    standing = await three(line, nursery)
    standing[0].scope.cancel()
    line.serve("a")
    await wait_all_tasks_blocked()
    assert [one.way for one in standing] == ["", "a", ""]


async def test_everybody_is_sent_away_when_it_closes(line: WaitQueue[str], nursery: trio.Nursery) -> None:
    standing = await three(line, nursery)
    line.serve("a")
    line.close()
    line.close()
    await wait_all_tasks_blocked()
    assert standing[0].way == "a"
    assert [one.sent_away for one in standing] == [False, True, True]
