"""All exposures of a process share one control connection to their relay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from tests.agent.support import (
    access_to,
    echo,
    local_server,
    relay_here,
    unused_port,
)
from tests.agent.test_expose import address, ask
from tests.agent.test_expose_secret import rotated, with_secret
from tests.agent.test_exposures import RecordedExposures, running, spec
from tests.agent.test_session import refuse_connections
from tests.control.test_daemon_auth import running as running_daemon
from tests.support.credentials import SECRET
from tests.support.peers import connect, is_dropped
from tunneld.agent import access, backoff, session
from tunneld.agent.access import RelayAccess
from tunneld.agent.exposures import ExposureSpec
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.relay_connection import MAX_RESTART_DELAY, RelayConnection
from tunneld.agent.source import VisitorConnection
from tunneld.agent.visitors import LocalVisitors
from tunneld.client import Client
from tunneld.client.exchange import ControlExchange
from tunneld.errors import RelayUnreachableError
from tunneld.net.endpoint import Endpoint, Target
from tunneld.tunnel.tunnel import Phase

NAMES = [f"e{number}" for number in range(10)]


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long delays add nothing to what is tested here."""
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the relay of each control connection that is made, or attempted."""
    made: list[str] = []
    really_connect = RelayAccess.connect

    def counted(self: RelayAccess) -> AbstractAsyncContextManager[Client]:
        made.append(self.where)
        return really_connect(self)

    monkeypatch.setattr(RelayAccess, "connect", counted)
    return made


def specs(target: Target, relay: RelayAccess, **options: str | float) -> dict[str, ExposureSpec]:
    return {name: spec(target, relay, name=name, **options) for name in NAMES}


async def all_reported(here: RecordedExposures, event: str, count: int = 1) -> None:
    for name in NAMES:
        await here.reporter(name).wait_for(event, count)


async def test_exposures_share_one_control_connection(each_backend: str, connects: list[str]) -> None:
    async with relay_here() as relay, local_server(echo) as target:
        async with running(**specs(target, relay.access)) as here:
            await all_reported(here, "opened")
            assert len({tunnel.spec.owner for tunnel in relay.service.tunnels()}) == 1
            assert len(connects) == 1
            relay.hang_up()
            await all_reported(here, "resumed")
            assert len({tunnel.id for tunnel in relay.service.tunnels()}) == len(NAMES)
            for name in NAMES:
                assert await ask(address(here.reporter(name)), name.encode()) == name.encode()
        assert list(relay.service.tunnels()) == []


async def test_exposures_at_two_relays_have_a_connection_each(connects: list[str]) -> None:
    async with (
        relay_here() as one,
        relay_here() as two,
        local_server(echo) as target,
        running(a=spec(target, one.access), b=spec(target, two.access)) as here,
    ):
        for name in "ab":
            await here.reporter(name).wait_for("opened")
        assert sorted(connects) == sorted([one.where, two.where])


async def killed_and_restarted(port: int, kill: trio.Event, task_status: trio.TaskStatus[None]) -> None:
    """Run a relay until `kill`, and then another one on the same port."""
    async with relay_here(port):
        task_status.started()
        await kill.wait()
    async with relay_here(port):
        await trio.sleep_forever()


async def test_all_exposures_are_back_after_a_kill_of_the_relay(each_backend: str, nursery: trio.Nursery) -> None:
    port, kill = unused_port(), trio.Event()
    await nursery.start(killed_and_restarted, port, kill)
    async with local_server(echo) as target, running(**specs(target, access_to(port))) as here:
        await all_reported(here, "opened")
        kill.set()
        await all_reported(here, "opened", 2)
        for name in NAMES:
            reporter = here.reporter(name)
            assert address(reporter, 1) == address(reporter, 0)
            assert await ask(address(reporter, 1), b"again") == b"again"
    nursery.cancel_scope.cancel()


class LostRelay(RelayAccess):
    """A relay that is always down, except that each connection in `lasting` is made and lasts that many seconds."""

    __slots__ = ("attempts", "lasting")

    def __init__(self, *lasting: float) -> None:
        super().__init__("127.0.0.1:1")
        self.lasting = list(lasting)
        self.attempts: list[float] = []

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        self.attempts.append(trio.current_time())
        if not self.lasting:
            raise RelayUnreachableError("connection refused")
        ours, theirs = memory_stream_pair()
        endpoint = Endpoint("tcp", "127.0.0.1", 1)
        client = Client(endpoint, "1", ("", ""), ControlExchange("tcp://127.0.0.1:1", ours, 1.0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lose, theirs, self.lasting.pop(0))
            yield client

    async def _lose(self, stream: trio.StapledStream[Any, Any], after: float) -> None:
        await trio.sleep(after)
        await stream.aclose()


async def delays(relay: LostRelay, seconds: float) -> list[float]:
    """The seconds between the attempts in that time."""
    connection = RelayConnection(relay, NetworkMonitor(), patient=True)
    async with trio.open_nursery() as nursery:
        with connection.attached(lambda _reason, _delay: None):
            nursery.start_soon(connection.run)
            await trio.sleep(seconds)
    return [after - before for before, after in pairwise(relay.attempts)]


@pytest.fixture
def real_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.2)
    monkeypatch.setattr(backoff, "MAX_DELAY", 60.0)


@pytest.mark.usefixtures("real_delays")
async def test_after_a_loss_the_relay_is_tried_often_while_it_may_be_restarting(autojump_clock: MockClock) -> None:
    found = await delays(LostRelay(100.0), 1000.0)
    in_time = found[1:15]
    assert all(delay <= MAX_RESTART_DELAY for delay in in_time)
    assert found[-1] > MAX_RESTART_DELAY, "later less often"


@pytest.mark.usefixtures("real_delays")
async def test_a_connection_that_does_not_last_is_tried_ever_more_slowly(autojump_clock: MockClock) -> None:
    found = await delays(LostRelay(*[1.0] * 100), 1000.0)
    assert found[-1] > 20


async def test_a_tunnel_whose_ttl_passes_while_the_relay_is_away_ends_its_exposure(each_backend: str) -> None:
    async with (
        local_server(echo) as target,
        relay_here() as relay,
        running(a=spec(target, relay.access, ttl=1.5)) as here,
    ):
        reporter = here.reporter("a")
        await reporter.wait_for("opened")
        refuse_connections(relay)
        relay.hang_up()
        closed = await reporter.wait_for("closed")
        assert closed["reason"] == "lifetime of 1.5 s is over (ttl)"


async def test_a_rotated_secret_is_one_failed_login_for_all(
    tmp_path: Path, connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "REVIEW_INTERVAL", 0.01)
    monkeypatch.setattr(access, "SECRET_CHECK_INTERVAL", 0.01)
    file, config = tmp_path / "secret", tmp_path / "tunnel.toml"
    config.write_text(with_secret(SECRET))
    file.write_text(SECRET)
    async with running_daemon(config) as relay, local_server(echo) as target:
        alice = RelayAccess(relay.control, credential=("alice", SECRET), reread_secret=file.read_text)
        async with running(**specs(target, alice)) as here:
            await all_reported(here, "opened")
            async with rotated(relay, "another"):
                await all_reported(here, "reconnecting", 2)
                assert len(connects) == 2, "the first one, and one with the old secret"
                file.write_text("another")
                await all_reported(here, "resumed")
            assert len(connects) == 3


async def test_a_bug_in_one_exposure_ends_it_alone_and_is_reported_once(
    each_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(stream: trio.SocketStream) -> None:
        raise AssertionError("this server is never reached")

    really_take = LocalVisitors.take

    async with relay_here() as relay, local_server(echo) as target, local_server(fail) as bad:

        def take(self: LocalVisitors, visitor: VisitorConnection, header: bytes) -> None:
            if self._locals[0].target == bad:
                visitor.close("a bug")
                raise ZeroDivisionError("a bug")
            really_take(self, visitor, header)

        monkeypatch.setattr(LocalVisitors, "take", take)
        async with running(bad=spec(bad, relay.access), good=spec(target, relay.access)) as here:
            for name in ("bad", "good"):
                await here.reporter(name).wait_for("opened")
            async with await connect(address(here.reporter("bad"))) as visitor:
                assert await is_dropped(visitor)
            reason = str((await here.reporter("bad").wait_for("ended"))["reason"])
            assert reason.startswith("a bug in the agent, please report it: ZeroDivisionError: a bug (test_relay_conn")
            assert await ask(address(here.reporter("good")), b"hello") == b"hello"
            await here.reporter("bad").wait_for("closed")
            assert len(here.reporter("bad").all("ended")) == 1
            assert not here.reporter("good").all("reconnecting")
            assert here.exposures.failures["bad"].exit_status == 70


async def test_two_exposures_that_share_a_tunnel_are_one_agent_and_the_last_one_drains_it(each_backend: str) -> None:
    async with relay_here() as relay, local_server(echo) as target:
        shared = {"name": "both", "share": "yes"}
        one, two = spec(target, relay.access, **shared), spec(target, relay.access, **shared)
        async with running(one=one, two=two) as here:
            for name in ("one", "two"):
                await here.reporter(name).wait_for("opened")
            here.exposures.apply({"two": two})
            await here.reporter("one").wait_for("closed")
            assert len(relay.service.tunnels()) == 1
            assert relay.tunnel.phase is not Phase.DRAINING
            assert await ask(address(here.reporter("two")), b"still") == b"still"
            here.exposures.apply({})
            await here.reporter("two").wait_for("closed")
        assert list(relay.service.tunnels()) == []
