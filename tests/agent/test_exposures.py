"""Several exposures in one process: each runs and fails alone, and a reload may change them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import trio
import trio.testing

from tests.agent.support import (
    PATIENCE,
    Handler,
    RecordingReporter,
    carriers_of,
    echo,
    local_server,
    relay_here,
    unused_port,
    using_backend,
)
from tests.agent.test_expose import address, ask
from tests.support.peers import connect, is_dropped, is_refused, read_exactly
from tunneld.agent import backoff
from tunneld.agent.access import RelayAccess
from tunneld.agent.config import Changes, ExposureConfig
from tunneld.agent.events import Activity
from tunneld.agent.exposures import Exposures, ExposureSpec
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.request import TunnelRequest
from tunneld.net.endpoint import Endpoint, Target


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long delays add nothing to what is tested here."""
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)


class RecordedExposures:
    """Exposures whose reporters record events; reporters and counts by name."""

    def __init__(self) -> None:
        self.reporters: dict[str, RecordingReporter] = {}
        self.activities: dict[str, Callable[[], Activity]] = {}
        self.exposures = Exposures(self._new_reporter, NetworkMonitor())

    def reporter(self, name: str) -> RecordingReporter:
        return self.reporters.setdefault(name, RecordingReporter())

    def _new_reporter(self, name: str, _config: ExposureConfig, activity: Callable[[], Activity]) -> RecordingReporter:
        self.activities[name] = activity
        return self.reporter(name)


@asynccontextmanager
async def running(**specs: ExposureSpec) -> AsyncIterator[RecordedExposures]:
    """Run these exposures for the length of the block."""
    recorded = RecordedExposures()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recorded.exposures.run, specs)
            yield recorded
            nursery.cancel_scope.cancel()


def spec(target: Target, relay: RelayAccess, **options: str | float) -> ExposureSpec:
    return ExposureSpec(ExposureConfig(target, TunnelRequest(options)), relay)


async def test_two_servers_are_reachable_from_one_process() -> None:
    async with relay_here() as relay, local_server(echo) as one, local_server(echo) as two:
        async with running(a=spec(one, relay.access), b=spec(two, relay.access)) as here:
            for name in "ab":
                await here.reporter(name).wait_for("opened")
                assert await ask(address(here.reporter(name)), name.encode()) == name.encode()
            assert here.activities["a"]().stats.served == 1
        assert list(relay.service.tunnels()) == []


async def test_draining_ends_with_the_last_visitor_and_starts_nothing_new() -> None:
    async with relay_here() as relay, local_server(echo) as one, local_server(echo) as two:
        specs = {"a": spec(one, relay.access), "b": spec(two, relay.access)}
        here, ended = RecordedExposures(), trio.Event()

        async def run() -> None:
            await here.exposures.run(specs)
            ended.set()

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                for name in "ab":
                    await here.reporter(name).wait_for("opened")
                visitor = await connect(address(here.reporter("a")))
                await visitor.send_all(b"before")
                assert await read_exactly(visitor, 6) == b"before"
                here.exposures.drain("told to stop")
                await here.reporter("b").wait_for("closed")
                await here.reporter("a").wait_for("draining")
                assert here.exposures.apply({**specs, "c": spec(one, relay.access)}) == Changes()
                assert not ended.is_set()
                await visitor.send_all(b"after")
                assert await read_exactly(visitor, 5) == b"after"
                await visitor.aclose()
                await ended.wait()
        assert list(relay.service.tunnels()) == []


async def test_an_exposure_that_fails_permanently_ends_alone_and_is_recorded() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        good, bad = spec(target, relay.access), spec(target, relay.access, name="a b")
        async with running(good=good, bad=bad) as here:
            ended = await here.reporter("bad").wait_for("ended")
            assert "not a name" in str(ended["reason"])
            await here.reporter("good").wait_for("opened")
            assert await ask(address(here.reporter("good")), b"still here") == b"still here"
            assert list(here.exposures.failures) == ["bad"]
            here.exposures.apply({"good": good, "bad": bad})
            await here.reporter("bad").wait_for("ended", 2)
            here.exposures.apply({"good": good, "bad": spec(target, relay.access)})
            await here.reporter("bad").wait_for("opened")
            assert here.exposures.failures == {}


async def test_run_ends_with_the_last_exposure() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        here = RecordedExposures()
        with trio.fail_after(PATIENCE):
            await here.exposures.run(
                {"a": spec(target, relay.access, ttl=0.2), "b": spec(target, relay.access, ttl=0.1)}
            )
        assert {name: reporter.events[-1][0] for name, reporter in here.reporters.items()} == {
            "a": "closed",
            "b": "closed",
        }
        assert here.exposures.apply({"a": spec(target, relay.access)}) == Changes()


async def test_an_expired_exposure_stays_closed_after_a_reload_without_changes() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        short, long = spec(target, relay.access, ttl=0.3), spec(target, relay.access)
        async with running(short=short, long=long) as here:
            await here.reporter("short").wait_for("opened")
            here.exposures.apply({"short": replace(short), "long": long})
            await here.reporter("short").wait_for("closed")
            await trio.testing.wait_all_tasks_blocked(0.01)
            here.exposures.apply({"short": replace(short), "long": long})
            here.exposures.apply({"long": long, "last": short})
            await here.reporter("last").wait_for("closed")
            assert len(here.reporter("short").all("opened")) == 1


async def test_changes_open_close_or_replace_exposures_and_leave_the_other_ones_alone() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        stays, goes = spec(target, relay.access), spec(target, relay.access)
        changes = spec(target, relay.access, name="old")
        async with running(stays=stays, goes=goes, changes=changes) as here:
            for reporter in [here.reporter(name) for name in ("stays", "goes", "changes")]:
                await reporter.wait_for("opened")
            stream = await connect(address(here.reporter("stays")))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            made = here.exposures.apply(
                {
                    "stays": replace(stays),
                    "comes": spec(target, relay.access),
                    "changes": spec(target, relay.access, name="new"),
                }
            )
            assert made == Changes(added=("comes",), removed=("goes",), replaced=("changes",))
            assert (await here.reporter("goes").wait_for("closed"))["reason"] == "removed from the configuration"
            assert (await here.reporter("changes").wait_for("closed"))["reason"] == "configuration changed"
            await here.reporter("comes").wait_for("opened")
            await here.reporter("changes").wait_for("opened", 2)
            await stream.send_all(b"after")
            assert await read_exactly(stream, 5) == b"after"
            assert [event for event, _ in here.reporter("stays").events] == ["opened", "visitor"]
            assert {tunnel.spec.options.name for tunnel in relay.service.tunnels()} == {"", "new"}
            assert len(list(relay.service.tunnels())) == 3


def replying(word: bytes) -> Handler:
    """A server that sends this word to each visitor at once and after each message."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(word)
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                await stream.send_all(word)

    return serve


async def gets_reply(visitor: trio.SocketStream, word: bytes) -> bool:
    """Send a message; returns whether the server replies with this word."""
    await visitor.send_all(b"?")
    return await read_exactly(visitor, len(word)) == word


@pytest.mark.usefixtures("each_backend")
async def test_visitors_of_a_replaced_exposure_finish_while_its_successor_serves_the_same_address() -> None:
    async with (
        relay_here() as relay,
        local_server(replying(b"old")) as old,
        local_server(replying(b"new")) as new,
        running(web=spec(old, relay.access, name="web")) as here,
    ):
        web = here.reporter("web")
        await web.wait_for("opened")
        visitor = await connect(address(web))
        assert await read_exactly(visitor, 3) == b"old"
        here.exposures.apply({"web": spec(new, relay.access, name="web")})
        await web.wait_for("opened", 2)
        assert address(web, 1) == address(web)
        new_visitor = await connect(address(web))
        assert await read_exactly(new_visitor, 3) == b"new"
        assert await gets_reply(visitor, b"old")
        assert (here.activities["web"]().stats.now, len(web.all("closed"))) == (1, 0)
        await visitor.aclose()
        closed = await web.wait_for("closed")
        assert (closed["id"], closed["reason"]) == (web.all("opened")[0]["id"], "configuration changed")
        while len(relay.service.tunnels()) != 1:
            await trio.lowlevel.checkpoint()
        assert await gets_reply(new_visitor, b"new")
        assert [await first_word(address(web)) for _ in range(3)] == [b"new"] * 3


async def first_word(uri: Endpoint) -> bytes:
    stream = await connect(uri)
    async with stream:
        return await read_exactly(stream, 3)


@pytest.fixture
def _webmux() -> Iterator[None]:
    with using_backend("webmux"):
        yield


@pytest.mark.usefixtures("_webmux")
async def test_a_replacement_can_dial_more_carriers_after_its_predecessor_is_gone() -> None:
    """Both have the same tunnel key."""
    async with (
        relay_here() as relay,
        local_server(replying(b"old")) as old,
        local_server(replying(b"new")) as new,
        running(web=spec(old, relay.access, name="web")) as here,
    ):
        web = here.reporter("web")
        await web.wait_for("opened")
        visitor = await connect(address(web))
        assert await read_exactly(visitor, 3) == b"old"
        here.exposures.apply({"web": spec(new, relay.access, name="web")})
        await web.wait_for("opened", 2)
        assert await first_word(address(web)) == b"new"
        await visitor.aclose()
        await web.wait_for("closed")
        while len(relay.service.tunnels()) != 1:
            await trio.lowlevel.checkpoint()
        for carrier in carriers_of(relay.tunnel):
            carrier.close("a test")
        assert await first_word(address(web)) == b"new"
        assert len(web.all("opened")) == 2


async def test_visitors_of_a_removed_exposure_finish_and_its_name_can_be_opened_again_meanwhile() -> None:
    async with relay_here() as relay, local_server(replying(b"old")) as old, local_server(replying(b"new")) as new:
        stays, web = spec(old, relay.access), spec(old, relay.access, name="web")
        async with running(stays=stays, web=web) as here:
            reporter = here.reporter("web")
            await reporter.wait_for("opened")
            visitor = await connect(address(reporter))
            assert await read_exactly(visitor, 3) == b"old"
            here.exposures.apply({"stays": stays})
            assert (await reporter.wait_for("draining"))["visitors"] == 1
            assert await is_refused(address(reporter))
            assert await gets_reply(visitor, b"old")
            here.exposures.apply({"stays": stays, "web": spec(new, relay.access, name="web")})
            await reporter.wait_for("opened", 2)
            assert await first_word(address(reporter)) == b"new"
            assert await gets_reply(visitor, b"old")
            await visitor.aclose()
            assert (await reporter.wait_for("closed"))["reason"] == "removed from the configuration"


async def test_visitors_that_do_not_finish_are_dropped_after_the_drain_timeout() -> None:
    async with relay_here() as relay, local_server(replying(b"old")) as old, local_server(replying(b"new")) as new:
        short = ExposureSpec(ExposureConfig(old, TunnelRequest({"name": "web"}), drain_timeout=0), relay.access)
        async with running(web=short) as here:
            reporter = here.reporter("web")
            await reporter.wait_for("opened")
            visitor = await connect(address(reporter))
            assert await read_exactly(visitor, 3) == b"old"
            here.exposures.apply({"web": spec(new, relay.access, name="web")})
            assert await is_dropped(visitor)
            await reporter.wait_for("opened", 2)
            assert await first_word(address(reporter)) == b"new"


async def test_run_ends_only_after_the_replaced_exposures() -> None:
    async with relay_here() as relay, local_server(replying(b"old")) as old, local_server(replying(b"new")) as new:
        here, ended = RecordedExposures(), trio.Event()

        async def run() -> None:
            await here.exposures.run({"web": spec(old, relay.access, name="web")})
            ended.set()

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                reporter = here.reporter("web")
                await reporter.wait_for("opened")
                visitor = await connect(address(reporter))
                assert await read_exactly(visitor, 3) == b"old"
                here.exposures.apply({"web": spec(new, relay.access, name="web")})
                await reporter.wait_for("opened", 2)
                here.exposures.drain("told to stop")
                await reporter.wait_for("closed")
                assert not ended.is_set()
                assert await gets_reply(visitor, b"old")
                await visitor.aclose()
                await ended.wait()
        assert [closed["reason"] for closed in reporter.all("closed")] == ["told to stop", "configuration changed"]


async def test_an_exposure_that_is_removed_and_added_at_once_is_opened_again() -> None:
    async with relay_here() as relay, local_server(echo) as target:
        one, other = spec(target, relay.access), spec(target, relay.access)
        async with running(one=one, other=other) as here:
            await here.reporter("one").wait_for("opened")
            here.exposures.apply({"other": other})
            here.exposures.apply({"one": one, "other": other})
            await here.reporter("one").wait_for("opened", 2)
            assert await ask(address(here.reporter("one"), 1), b"again") == b"again"


async def test_an_exposure_waits_for_a_relay_that_is_not_up_yet() -> None:
    port = unused_port()
    async with local_server(echo) as target, running(a=spec(target, RelayAccess(f"127.0.0.1:{port}"))) as here:
        await here.reporter("a").wait_for("reconnecting", 2)
        async with relay_here(port):
            await here.reporter("a").wait_for("opened")
            assert await ask(address(here.reporter("a")), b"at last") == b"at last"
