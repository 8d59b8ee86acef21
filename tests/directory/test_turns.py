"""Requests take turns, and owners wait for one step of each other owner at most."""

from __future__ import annotations

import pytest
import trio

from tunneld.directory.requester import Requester
from tunneld.directory.turns import RequestTurns
from tunneld.policy.access import Grant

CONNECTIONS, STEPS = 10, 5


def requester(name: str, host: str = "192.0.2.1") -> Requester:
    return Requester(host, f"{name}@{host}:9", "127.0.0.1", Grant(name) if name else None)


async def take_steps(turns: RequestTurns, who: Requester, steps: list[str], name: str) -> None:
    for _ in range(STEPS):
        async with turns.step(who):
            steps.append(name)


@pytest.mark.parametrize("owners", [1, CONNECTIONS])
async def test_there_is_one_step_per_turn_of_the_scheduler_however_many_connections_and_owners(owners: int) -> None:
    turns, steps = RequestTurns(), list[str]()
    most, done = 0, False

    async def count_turns() -> None:
        nonlocal most
        while not done:
            before = len(steps)
            await trio.lowlevel.checkpoint()
            most = max(most, len(steps) - before)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        async with trio.open_nursery() as crowd:
            for number in range(CONNECTIONS):
                crowd.start_soon(take_steps, turns, requester(f"mallory-{number % owners}"), steps, "mallory")
        done = True
    assert len(steps) == CONNECTIONS * STEPS
    assert most == 1
    assert not len(turns)


async def test_the_steps_of_another_owner_come_in_between() -> None:
    turns, steps = RequestTurns(), list[str]()
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(take_steps, turns, requester("mallory"), steps, "mallory")
        nursery.start_soon(take_steps, turns, requester("home"), steps, "home")
    last = max(index for index, name in enumerate(steps) if name == "home")
    assert last < 3 * STEPS


async def test_without_a_credential_the_address_is_the_owner() -> None:
    turns = RequestTurns()
    async with turns.step(requester("", "192.0.2.1")), turns.step(requester("", "192.0.2.2")):
        assert len(turns) == 2


async def test_a_cancelled_wait_leaves_the_queue() -> None:
    turns = RequestTurns()
    async with turns.step(requester("home")):
        with trio.move_on_after(0) as scope:
            async with turns.step(requester("home")):
                raise AssertionError("two steps at once")
        assert scope.cancelled_caught
    assert not len(turns)
