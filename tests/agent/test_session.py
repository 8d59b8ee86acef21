"""Withdrawing a tunnel loses no visitor that is on its way, and leaving it works over any connection that is left."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from tests.agent.support import (
    PATIENCE,
    RecordingReporter,
    RelayHere,
    agent,
    carriers_of,
    echo,
    exposed,
    local_server,
    relay_here,
)
from tests.agent.test_expose import address, ask
from tests.support.peers import connect, is_dropped, read_exactly
from tunneld.agent import local, pool, session
from tunneld.agent.access import RelayAccess
from tunneld.agent.expose import Exposure
from tunneld.agent.health import Check, UnhealthyPolicy
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import OpenTunnel, TunnelRequest
from tunneld.agent.session import TunnelSession
from tunneld.agent.source import ConnectionSource
from tunneld.client import Client
from tunneld.config.schema import ControlSettings
from tunneld.control.server import serve_lines
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.errors import NoSuchTunnelError
from tunneld.mux.connection import Connection
from tunneld.net import dial, sockets
from tunneld.net.endpoint import Endpoint
from tunneld.net.listeners import ReloadableListener
from tunneld.tunnel.tunnel import Phase, Tunnel
from tunneld.wire.lines import ControlRequest
from tunneld.wire.proxy_protocol import encode_v2

HEADER = encode_v2(("192.0.2.1", 4242), ("192.0.2.2", 80))
WITHDRAW = Check("tcp", policy=UnhealthyPolicy.WITHDRAW)


class SlowRelay:
    """A relay with one tcp tunnel. The test holds its parked connections and decides when it answers `trim`."""

    def __init__(self, parked: trio.SocketListener) -> None:
        self.parked = parked
        self.trims = 0
        self.trim_asked = trio.Event()
        self.may_answer = trio.Event()
        self.checked = trio.Event()

    async def __call__(self, request: ControlRequest, _caller: Requester) -> Reply:
        port = self.parked.socket.getsockname()[1]
        match request.verb:
            case "opentunnel":
                return Reply(f"tcp://127.0.0.1:{port}", items=[{"id": "t1", "client": "tcp://127.0.0.1:1"}])
            case "show":
                return Reply(items=[{"id": "t1", "client": "tcp://127.0.0.1:1", "age": 0, "phase": "ready"}])
            case "trim":
                self.trims += 1
                self.trim_asked.set()
                await self.may_answer.wait()
            case "gettunneladdress":
                self.checked.set()
        return Reply()


@asynccontextmanager
async def one_parked() -> AsyncIterator[tuple[SlowRelay, Exposure, trio.SocketStream, RecordingReporter]]:
    """An agent of such a relay, with one parked connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    relay, control, reporter = (
        SlowRelay(listener),
        ReloadableListener("control", sockets.bind_tcp("127.0.0.1", 0)),
        RecordingReporter(),
    )
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery, listener:
            await nursery.start(serve_lines, control, ControlSettings, lambda: None, relay)
            access, request = (
                RelayAccess(f"127.0.0.1:{control.port}"),
                TunnelRequest(limits=PoolLimits(1, 1), backend="tcp"),
            )
            async with (
                local_server(echo) as target,
                exposed(target, access, reporter, request) as exposure,
                await listener.accept() as parked,
            ):
                yield relay, exposure, parked, reporter
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def withdrawn() -> AsyncIterator[tuple[SlowRelay, Exposure, trio.SocketStream]]:
    """The same, after the agent has withdrawn."""
    async with one_parked() as (relay, exposure, parked, _):
        exposure.on_health(WITHDRAW, healthy=False)
        await relay.trim_asked.wait()
        yield relay, exposure, parked


async def test_a_visitor_that_the_relay_paired_before_it_trimmed_is_served() -> None:
    async with withdrawn() as (relay, exposure, paired):
        await paired.send_all(HEADER + b"hello")
        assert await read_exactly(paired, 5) == b"hello"
        relay.may_answer.set()
        assert (exposure.stats.now, exposure.stats.failed) == (1, 0)


async def test_no_connection_is_parked_until_the_server_is_healthy_again() -> None:
    async with withdrawn() as (relay, exposure, parked):
        await parked.aclose()
        relay.may_answer.set()
        while exposure.stats.parked:
            await trio.lowlevel.checkpoint()
        exposure.on_health(WITHDRAW, healthy=False)
        exposure.on_health(WITHDRAW, healthy=True)
        async with await relay.parked.accept() as again:
            await again.send_all(HEADER + b"hello")
            assert await read_exactly(again, 5) == b"hello"
            assert relay.trims == 1


async def test_a_server_that_is_healthy_again_before_the_relay_answers_keeps_the_parked_connections() -> None:
    async with withdrawn() as (relay, exposure, parked):
        exposure.on_health(WITHDRAW, healthy=True)
        relay.may_answer.set()
        await parked.send_all(HEADER + b"hello")
        assert await read_exactly(parked, 5) == b"hello"
        assert relay.trims == 1


async def test_a_connection_lost_just_before_withdrawing_is_not_dialled_again() -> None:
    async with one_parked() as (relay, exposure, parked, reporter):
        await parked.aclose()
        await reporter.wait_for("trouble")
        exposure.on_health(WITHDRAW, healthy=False)
        await relay.checked.wait()
        assert (relay.trims, exposure.stats.parked) == (0, 0)


async def test_a_connection_that_the_relay_never_closes_is_closed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "TRIM_INTERVAL", 0.001)
    async with withdrawn() as (relay, exposure, parked):
        relay.may_answer.set()
        assert await is_dropped(parked)
        assert (relay.trims, exposure.stats.parked) == (session.MAX_TRIMS, 0)


async def test_an_agent_that_withdraws_without_a_control_connection_stays_withdrawn_when_reconnected(
    each_backend: str,
) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter) as exposure,
        ):
            while not relay.tunnel.parked:
                await trio.lowlevel.checkpoint()
            relay.hang_up()
            exposure.on_health(WITHDRAW, healthy=False)
            exposure.retry_now()
            await reporter.wait_for("resumed")
            while relay.tunnel.parked:
                await trio.lowlevel.checkpoint()
            exposure.on_health(WITHDRAW, healthy=True)
            assert await ask(address(reporter), b"hello") == b"hello"
            assert len(reporter.all("opened")) == 1


# A shortage of descriptors


async def test_after_a_shortage_the_pool_is_refilled_as_soon_as_a_visitor_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "SHORTAGE_INTERVAL", 1e6)
    really_dial, short = dial.dial_nowait, list[OSError]()

    def dial_nowait(*args: Any) -> socket.socket:
        if short:
            raise short[0]
        return really_dial(*args)

    monkeypatch.setattr(pool, "dial_nowait", dial_nowait)
    reporter, request = RecordingReporter(), TunnelRequest(limits=PoolLimits(1, 1), backend="tcp")
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter, request),
        ):
            while not relay.tunnel.parked:
                await trio.lowlevel.checkpoint()
            short.append(OSError(errno.EMFILE, "Too many open files"))
            visitor = await connect(address(reporter))
            await visitor.send_all(b"served")
            assert await read_exactly(visitor, 6) == b"served"
            reason = (await reporter.wait_for("trouble"))["reason"]
            assert reason == "could not connect to the relay: too many open files"
            short.clear()
            await visitor.aclose()
            assert await ask(address(reporter), b"next") == b"next"
            assert not reporter.all("reconnecting")


@pytest.mark.interpreted
async def test_without_a_port_for_the_local_server_the_visitor_is_reset(
    each_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end in order would tell the visitor that the server had nothing to say."""

    def dial_nowait(_: object) -> socket.socket:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            monkeypatch.setattr(local, "dial_nowait", dial_nowait)
            async with await connect(address(reporter)) as visitor:
                with pytest.raises(trio.BrokenResourceError):
                    await visitor.receive_some()
            reason = str((await reporter.wait_for("failed"))["reason"])
            assert reason.endswith(": cannot assign requested address")


# Leaving


def refuse_connections(relay: RelayHere) -> None:
    """Have the control port refuse new connections."""
    control = relay.settings.control.model_copy(update={"max_connections": 0})
    relay.settings = relay.settings.model_copy(update={"control": control})


async def test_an_agent_that_is_cancelled_closes_its_tunnel_over_its_open_connection(each_backend: str) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            async with exposed(target, relay.access, reporter):
                refuse_connections(relay)
            assert list(relay.service.tunnels()) == []


@contextmanager
def not_reading(tunnel: Tunnel) -> Iterator[None]:
    """The relay reads nothing from the tunnel's carriers for the length of the block."""
    pairs = [
        (carrier._connection.connection.fileno(), carrier)
        for carrier in carriers_of(tunnel)
        if isinstance(carrier._connection, Connection)
    ]
    for descriptor, carrier in pairs:
        carrier.pump.detach(descriptor, carrier)
    yield
    for descriptor, carrier in pairs:
        carrier.pump.attach(descriptor, carrier)


@pytest.mark.parametrize("each_backend", ["webmux"], indirect=True)
async def test_a_dead_carrier_does_not_keep_the_agent_from_leaving(
    each_backend: str,
) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            agent(target, relay.access, reporter) as exposure,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(exposure.run)
            await reporter.wait_for("opened")
            visitor = await connect(address(reporter))
            await visitor.send_all(b"before")
            assert await read_exactly(visitor, 6) == b"before"
            with not_reading(relay.tunnel):
                exposure.drain("told to stop", PATIENCE)
                while relay.tunnel.phase is not Phase.DRAINING:
                    await trio.lowlevel.checkpoint()
                assert not reporter.all("draining"), "it still waits for the carrier"
            await reporter.wait_for("draining")
            await visitor.aclose()


class UncertifiedRelay:
    """A client of a relay that has no certificate for the host name of the tunnel, for these reasons in turn."""

    def __init__(self, *reasons: str) -> None:
        self._reasons = iter(reasons)

    async def show(self, _reference: str) -> list[dict[str, str]]:
        await trio.lowlevel.checkpoint()
        reason = next(self._reasons, None)
        if reason is None:
            raise NoSuchTunnelError("the test is over")
        return [{"id": "t1", "certificate": reason} if reason else {"id": "t1"}]


class NoSource:
    """A source that never needs anything."""

    parked, size = 0, 1

    def resize(self) -> bool:
        return False


async def test_why_the_relay_has_no_certificate_is_reported_once(autojump_clock: MockClock) -> None:
    reports = RecordingReporter()
    uri = Endpoint.parse("https://blog.example.org/")
    session = TunnelSession(OpenTunnel("t1", Endpoint.parse("webmux://127.0.0.1:1/key"), uri, 0.0), reports)
    session._accepting, session.source = True, cast(ConnectionSource, NoSource())
    relay = UncertifiedRelay("", "no answer", "no answer", "refused", "", "refused")
    with pytest.raises(NoSuchTunnelError, match="over"):
        await session.keep(cast(Client, relay))
    assert [report["reason"] for report in reports.all("uncertified")] == ["no answer", "refused", "refused"]
    assert reports.all("uncertified")[0]["host"] == "blog.example.org"
