"""Several exposures in one process: each lives and fails alone, and what is wanted may change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import trio
import trio.testing

from tests.agent.support import BACKEND, PATIENCE, Handler, Told, echo, local_server, relay_here, unused_port
from tests.agent.test_expose import address, ask
from tests.support.people import connect, is_dropped, is_refused, read_exactly
from tunneld.agent import backoff
from tunneld.agent.access import RelayAccess
from tunneld.agent.config import Changes, ExposureConfig
from tunneld.agent.events import Stats
from tunneld.agent.exposures import Exposures, ExposureSpec
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.request import TunnelRequest
from tunneld.backends.webmux import WebMuxServerSide
from tunneld.net.endpoint import Endpoint, Target


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of waiting add nothing to what is tested here."""
    monkeypatch.setattr(backoff.delays, "__kwdefaults__", {"first": 0.01, "longest": 0.02})


class Harbour:
    """A fleet and what its exposures told, by name."""

    def __init__(self) -> None:
        self.told: dict[str, Told] = {}
        self.figures: dict[str, Callable[[], Stats]] = {}
        self.fleet = Exposures(self._teller_of, NetworkMonitor())

    def of(self, name: str) -> Told:
        return self.told.setdefault(name, Told())

    def _teller_of(self, name: str, _plan: ExposureConfig, figures: Callable[[], Stats]) -> Told:
        self.figures[name] = figures
        return self.of(name)


@asynccontextmanager
async def harbour(**wanted: ExposureSpec) -> AsyncIterator[Harbour]:
    made = Harbour()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.fleet.run, wanted)
            yield made
            nursery.cancel_scope.cancel()


def berth(target: Target, relay: RelayAccess, **options: str | float) -> ExposureSpec:
    return ExposureSpec(ExposureConfig(target, TunnelRequest(options)), relay)


async def test_two_servers_are_reachable_from_one_process() -> None:
    async with relay_here() as relay, local_server(echo) as one, local_server(echo) as two:
        async with harbour(a=berth(one, relay.access), b=berth(two, relay.access)) as here:
            for name in "ab":
                await here.of(name).wait_for("opened")
                assert await ask(address(here.of(name)), name.encode()) == name.encode()
            assert here.figures["a"]().served == 1
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
            assert {tunnel.spec.options.name for tunnel in relay.service.tunnels()} == {"", "new"}
            assert len(list(relay.service.tunnels())) == 3


def saying(word: bytes) -> Handler:
    """A server that says this word to whoever comes, and whatever it is told, until they leave."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(word)
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                await stream.send_all(word)

    return serve


async def hears(visitor: trio.SocketStream, word: bytes) -> bool:
    """Whether the server answers with this word."""
    await visitor.send_all(b"?")
    return await read_exactly(visitor, len(word)) == word


@pytest.mark.usefixtures("each_backend")
async def test_visitors_of_one_that_is_replaced_finish_while_its_successor_serves_at_the_same_address() -> None:
    async with (
        relay_here() as relay,
        local_server(saying(b"old")) as old,
        local_server(saying(b"new")) as new,
        harbour(web=berth(old, relay.access, name="web")) as here,
    ):
        web = here.of("web")
        await web.wait_for("opened")
        guest = await connect(address(web))
        assert await read_exactly(guest, 3) == b"old"
        here.fleet.apply({"web": berth(new, relay.access, name="web")})
        await web.wait_for("opened", 2)
        assert address(web, 1) == address(web)
        newcomer = await connect(address(web))
        assert await read_exactly(newcomer, 3) == b"new"
        assert await hears(guest, b"old")
        assert (here.figures["web"]().now, len(web.all("closed"))) == (1, 0)
        await guest.aclose()
        closed = await web.wait_for("closed")
        assert (closed["id"], closed["reason"]) == (web.all("opened")[0]["id"], "wanted in another way")
        while len(relay.service.tunnels()) != 1:
            await trio.lowlevel.checkpoint()
        assert await hears(newcomer, b"new")
        assert [await ask_once(address(web)) for _ in range(3)] == [b"new"] * 3


async def ask_once(uri: Endpoint) -> bytes:
    stream = await connect(uri)
    async with stream:
        return await read_exactly(stream, 3)


@pytest.fixture
def _webmux() -> Iterator[None]:
    token = BACKEND.set("webmux")
    yield
    BACKEND.reset(token)


@pytest.mark.usefixtures("_webmux")
async def test_a_successor_can_bring_further_carriers_after_its_former_is_gone() -> None:
    """The key by which the relay knows it was the former's as well."""
    async with (
        relay_here() as relay,
        local_server(saying(b"old")) as old,
        local_server(saying(b"new")) as new,
        harbour(web=berth(old, relay.access, name="web")) as here,
    ):
        web = here.of("web")
        await web.wait_for("opened")
        guest = await connect(address(web))
        assert await read_exactly(guest, 3) == b"old"
        here.fleet.apply({"web": berth(new, relay.access, name="web")})
        await web.wait_for("opened", 2)
        assert await ask_once(address(web)) == b"new"
        await guest.aclose()
        await web.wait_for("closed")
        while len(relay.service.tunnels()) != 1:
            await trio.lowlevel.checkpoint()
        side = relay.tunnel.server_side
        assert isinstance(side, WebMuxServerSide)
        for carrier in list(side.carriers):
            carrier.close("a test")
        assert await ask_once(address(web)) == b"new"
        assert len(web.all("opened")) == 2


async def test_visitors_of_one_that_is_removed_finish_and_its_name_may_come_back_meanwhile() -> None:
    async with relay_here() as relay, local_server(saying(b"old")) as old, local_server(saying(b"new")) as new:
        stays, web = berth(old, relay.access), berth(old, relay.access, name="web")
        async with harbour(stays=stays, web=web) as here:
            told = here.of("web")
            await told.wait_for("opened")
            guest = await connect(address(told))
            assert await read_exactly(guest, 3) == b"old"
            here.fleet.apply({"stays": stays})
            assert (await told.wait_for("draining"))["visitors"] == 1
            assert await is_refused(address(told))
            assert await hears(guest, b"old")
            here.fleet.apply({"stays": stays, "web": berth(new, relay.access, name="web")})
            await told.wait_for("opened", 2)
            assert await ask_once(address(told)) == b"new"
            assert await hears(guest, b"old")
            await guest.aclose()
            assert (await told.wait_for("closed"))["reason"] == "no longer wanted"


async def test_those_who_do_not_finish_are_cut_after_the_drain_timeout() -> None:
    async with relay_here() as relay, local_server(saying(b"old")) as old, local_server(saying(b"new")) as new:
        hasty = ExposureSpec(ExposureConfig(old, TunnelRequest({"name": "web"}), drain_timeout=0), relay.access)
        async with harbour(web=hasty) as here:
            told = here.of("web")
            await told.wait_for("opened")
            guest = await connect(address(told))
            assert await read_exactly(guest, 3) == b"old"
            here.fleet.apply({"web": berth(new, relay.access, name="web")})
            assert await is_dropped(guest)
            await told.wait_for("opened", 2)
            assert await ask_once(address(told)) == b"new"


async def test_a_fleet_ends_only_after_those_that_were_replaced_before() -> None:
    async with relay_here() as relay, local_server(saying(b"old")) as old, local_server(saying(b"new")) as new:
        here, ended = Harbour(), trio.Event()

        async def run() -> None:
            await here.fleet.run({"web": berth(old, relay.access, name="web")})
            ended.set()

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                told = here.of("web")
                await told.wait_for("opened")
                guest = await connect(address(told))
                assert await read_exactly(guest, 3) == b"old"
                here.fleet.apply({"web": berth(new, relay.access, name="web")})
                await told.wait_for("opened", 2)
                here.fleet.drain("told to stop")
                await told.wait_for("closed")
                assert not ended.is_set()
                assert await hears(guest, b"old")
                await guest.aclose()
                await ended.wait()
        assert [closed["reason"] for closed in told.all("closed")] == ["told to stop", "wanted in another way"]


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
