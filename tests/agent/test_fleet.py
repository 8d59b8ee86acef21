"""Several exposures in one process: each lives and fails alone, and what is wanted may change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from tests.agent.support import PATIENCE, Told, echo, local_server, relay_here, unused_port
from tests.agent.test_expose import address, ask
from tests.support.people import connect, read_exactly
from tunneld.agent import backoff
from tunneld.agent.access import RelayAccess
from tunneld.agent.fleet import Berth, Fleet
from tunneld.agent.keeper import Wish
from tunneld.agent.plan import Changes, Plan
from tunneld.agent.wake import Wake
from tunneld.endpoint import Target


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of waiting add nothing to what is tested here."""
    monkeypatch.setattr(backoff.delays, "__kwdefaults__", {"first": 0.01, "longest": 0.02})


class Harbour:
    """A fleet and what its exposures told, by name."""

    def __init__(self) -> None:
        self.told: dict[str, Told] = {}
        self.fleet = Fleet(lambda name, _: self.of(name), Wake())

    def of(self, name: str) -> Told:
        return self.told.setdefault(name, Told())


@asynccontextmanager
async def harbour(**wanted: Berth) -> AsyncIterator[Harbour]:
    made = Harbour()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.fleet.run, wanted)
            yield made
            nursery.cancel_scope.cancel()


def berth(target: Target, relay: RelayAccess, **options: str | float) -> Berth:
    return Berth(Plan(target, Wish(options)), relay)


async def test_two_servers_are_reachable_from_one_process() -> None:
    async with relay_here() as relay, local_server(echo) as one, local_server(echo) as two:
        async with harbour(a=berth(one, relay.access), b=berth(two, relay.access)) as here:
            for name in "ab":
                await here.of(name).wait_for("opened")
                assert await ask(address(here.of(name)), name.encode()) == name.encode()
            assert here.fleet.figures("a").served == 1
        assert list(relay.service.tunnels()) == []


async def test_a_fleet_that_drains_ends_when_the_last_visitor_has_left_and_begins_nothing_new() -> None:
    async with relay_here() as relay, local_server(echo) as one, local_server(echo) as two:
        wanted = {"a": berth(one, relay.access), "b": berth(two, relay.access)}
        here, ended = Harbour(), trio.Event()

        async def run() -> None:
            await here.fleet.run(wanted)
            ended.set()

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                for name in "ab":
                    await here.of(name).wait_for("opened")
                visitor = await connect(address(here.of("a")))
                await visitor.send_all(b"before")
                assert await read_exactly(visitor, 6) == b"before"
                here.fleet.drain("told to stop")
                await here.of("b").wait_for("closed")
                await here.of("a").wait_for("draining")
                assert here.fleet.apply({**wanted, "c": berth(one, relay.access)}) == Changes()
                assert not ended.is_set()
                await visitor.send_all(b"after")
                assert await read_exactly(visitor, 5) == b"after"
                await visitor.aclose()
                await ended.wait()
        assert list(relay.service.tunnels()) == []


async def test_one_that_fails_for_good_ends_alone_and_is_remembered() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        good, bad = berth(target, relay.access), berth(target, relay.access, name="a b")
        async with harbour(good=good, bad=bad) as here:
            ended = await here.of("bad").wait_for("ended")
            assert "not a name" in str(ended["reason"])
            await here.of("good").wait_for("opened")
            assert await ask(address(here.of("good")), b"still here") == b"still here"
            assert list(here.fleet.failures) == ["bad"]
            here.fleet.apply({"good": good, "bad": bad})
            await here.of("bad").wait_for("ended", 2)
            here.fleet.apply({"good": good, "bad": berth(target, relay.access)})
            await here.of("bad").wait_for("opened")
            assert here.fleet.failures == {}


async def test_the_fleet_ends_with_its_last_exposure() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        here = Harbour()
        with trio.fail_after(PATIENCE):
            await here.fleet.run({"a": berth(target, relay.access, ttl=0.2), "b": berth(target, relay.access, ttl=0.1)})
        assert {name: told.events[-1][0] for name, told in here.told.items()} == {"a": "closed", "b": "closed"}
        assert here.fleet.apply({"a": berth(target, relay.access)}) == Changes()


async def test_one_whose_time_is_over_stays_closed_also_after_a_reload_that_changed_nothing() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        short, long = berth(target, relay.access, ttl=0.3), berth(target, relay.access)
        async with harbour(short=short, long=long) as here:
            await here.of("short").wait_for("opened")
            here.fleet.apply({"short": replace(short), "long": long})
            await here.of("short").wait_for("closed")
            await trio.testing.wait_all_tasks_blocked(0.01)
            here.fleet.apply({"short": replace(short), "long": long})
            here.fleet.apply({"long": long, "last": short})
            await here.of("last").wait_for("closed")
            assert len(here.of("short").all("opened")) == 1


async def test_what_changes_is_opened_closed_or_replaced_and_nothing_else_is_touched() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        stays, goes = berth(target, relay.access), berth(target, relay.access)
        changes = berth(target, relay.access, name="old")
        async with harbour(stays=stays, goes=goes, changes=changes) as here:
            for told in [here.of(name) for name in ("stays", "goes", "changes")]:
                await told.wait_for("opened")
            stream = await connect(address(here.of("stays")))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            made = here.fleet.apply(
                {
                    "stays": replace(stays),
                    "comes": berth(target, relay.access),
                    "changes": berth(target, relay.access, name="new"),
                }
            )
            assert made == Changes(added=("comes",), removed=("goes",), replaced=("changes",))
            assert (await here.of("goes").wait_for("closed"))["reason"] == "no longer wanted"
            assert (await here.of("changes").wait_for("closed"))["reason"] == "wanted in another way"
            await here.of("comes").wait_for("opened")
            await here.of("changes").wait_for("opened", 2)
            await stream.send_all(b"after")
            assert await read_exactly(stream, 5) == b"after"
            assert [event for event, _ in here.of("stays").events] == ["opened", "visitor"]
            assert {tunnel.opening.options.name for tunnel in relay.service.tunnels()} == {"", "new"}
            assert len(list(relay.service.tunnels())) == 3


async def test_one_that_was_removed_and_is_wanted_again_at_once_is_opened_again() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        one, other = berth(target, relay.access), berth(target, relay.access)
        async with harbour(one=one, other=other) as here:
            await here.of("one").wait_for("opened")
            here.fleet.apply({"other": other})
            here.fleet.apply({"one": one, "other": other})
            await here.of("one").wait_for("opened", 2)
            assert await ask(address(here.of("one"), 1), b"again") == b"again"


async def test_a_relay_that_is_not_there_yet_is_waited_for() -> None:
    port = unused_port()
    async with local_server(echo) as target, harbour(a=berth(target, RelayAccess(f"127.0.0.1:{port}"))) as here:
        await here.of("a").wait_for("reconnecting", 2)
        async with relay_here(port):
            await here.of("a").wait_for("opened")
            assert await ask(address(here.of("a")), b"at last") == b"at last"
