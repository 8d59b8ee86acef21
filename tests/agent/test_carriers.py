"""Agents with carriers: in TLS, several at once, lost and replaced."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

from tests.agent.support import (
    PATIENCE,
    RecordingReporter,
    RelayHere,
    carriers_of,
    echo,
    exposed,
    local_server,
    relay_here,
    using_backend,
)
from tests.agent.test_expose import address, ask
from tests.support.peers import connect, is_dropped, read_exactly
from tests.support.pki import Pki
from tunneld.agent import agent_carrier, backoff, request
from tunneld.agent import carriers as agent_carriers
from tunneld.agent.access import RelayAccess
from tunneld.agent.request import TunnelRequest
from tunneld.backends import webmux_shared
from tunneld.backends.webmux import WebMuxServerSide, find_side
from tunneld.errors import RefusedError, UsageError
from tunneld.mux import carrier as mux_carrier
from tunneld.mux.carrier import Carrier
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket
from tunneld.tls.contexts import client_tls_context
from tunneld.tunnel.keys import KeyRegistry


@pytest.fixture(autouse=True)
def _webmux() -> Iterator[None]:
    with using_backend("webmux"):
        yield


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


def carriers(relay: RelayHere) -> list[Carrier]:
    """The carriers of the only tunnel."""
    return carriers_of(relay.tunnel)


async def until_carriers(relay: RelayHere, count: int) -> list[Carrier]:
    while len(carriers(relay)) != count:
        await trio.lowlevel.checkpoint()
    return carriers(relay)


# In TLS


@pytest.mark.parametrize("trust", ["authority", "pin"])
async def test_everything_between_agent_and_relay_is_in_tls(pki: Pki, trust: str) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here(pki=pki) as relay, local_server(echo) as target:
            access = relay.access
            if trust == "pin":
                access = RelayAccess(access.where, client_tls_context(pin=pki.pin), timeout=PATIENCE)
            async with exposed(target, access, reporter):
                assert relay.tunnel.server_uri.scheme == "webmuxs"
                assert await ask(address(reporter), b"x" * 300_000) == b"x" * 300_000


async def test_the_next_connection_resumes_the_tls_session(pki: Pki) -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here(pki=pki) as relay, local_server(echo) as target:
            access = RelayAccess(relay.access.where, client_tls_context(pin=pki.pin), timeout=PATIENCE)
            async with exposed(target, access, reporter):
                assert await ask(address(reporter), b"served") == b"served"
                assert access.carrier_session is not None
                another = await access.dial_carrier(relay.tunnel.server_uri)
                assert isinstance(another, TlsSocket)
                assert another.session_reused
                another.close()


async def test_encryption_is_not_lost_silently(pki: Pki) -> None:
    with using_backend("tcp"), trio.fail_after(PATIENCE):  # the relay has no webmux
        async with relay_here(pki=pki) as relay, local_server(echo) as target:
            for options, scheme in (({}, "tls"), ({"secure": "key"}, "tcp"), ({"secure": "no"}, "tcp")):
                reporter = RecordingReporter()
                async with exposed(target, relay.access, reporter, TunnelRequest(options)):
                    server = relay.tunnel.server_uri
                    assert (server.scheme, bool(server.key)) == (scheme, options != {"secure": "no"})
                    assert await ask(address(reporter), b"meant") == b"meant"


async def test_a_system_that_cannot_encrypt_says_so(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "HAS_CARRIERS", False)
    with trio.fail_after(PATIENCE):
        async with relay_here(pki=pki) as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(UsageError, match="--secure no"), flatten_subgroups=True):
                async with exposed(target, relay.access, RecordingReporter()):
                    pass


async def test_a_wrong_option_is_not_mistaken_for_a_missing_backend(pki: Pki) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here(pki=pki) as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(RefusedError, match="max_visitors"), flatten_subgroups=True):
                async with exposed(target, relay.access, RecordingReporter(), TunnelRequest({"max_visitors": "0"})):
                    pass


# Many


async def test_hundreds_of_visitors_at_once_cause_more_carriers_and_all_are_served() -> None:
    reporter = RecordingReporter(wants_visitors=False)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo, backlog=1000) as target,
            exposed(target, relay.access, reporter),
        ):
            visitors = [await connect(address(reporter)) for _ in range(300)]
            for number, visitor in enumerate(visitors):
                await visitor.send_all(b"%05d" % number)
            for number, visitor in enumerate(visitors):
                assert await read_exactly(visitor, 5) == b"%05d" % number
            assert len(carriers(relay)) >= 3
            side = relay.tunnel.server_side
            assert isinstance(side, WebMuxServerSide)
            assert sum(len(carrier.channels) for carrier in side.carriers) == 300
            assert not reporter.all("failed")


class DialRounds:
    """Carriers with few places, dialled only once a crowd waits. `sizes` has the number dialled in each round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, places: int) -> None:
        self.sizes: list[int] = []
        self.begin = trio.Event()
        self._together = 0
        self._really_dial = RelayAccess.dial_carrier
        monkeypatch.setattr(mux_carrier, "MAX_CHANNELS", places)
        monkeypatch.setattr(agent_carrier, "NEARLY_FULL_CHANNELS", places - 1)

        async def dial(access: RelayAccess, uri: Endpoint) -> socket.socket | TlsSocket:
            return await self._dial(access, uri)

        monkeypatch.setattr(RelayAccess, "dial_carrier", dial)

    async def _dial(self, access: RelayAccess, uri: Endpoint) -> socket.socket | TlsSocket:
        """Dials of the same round start in the same turn of the scheduler."""
        self._together += 1
        await self.begin.wait()
        await trio.lowlevel.checkpoint()
        if self._together:
            self.sizes.append(self._together)
            self._together = 0
        return await self._really_dial(access, uri)

    async def crowd(self, relay: RelayHere, reporter: RecordingReporter, count: int) -> list[trio.SocketStream]:
        """Connect `count` visitors one after another; all of them wait, in this order, when this returns."""
        visitors: list[trio.SocketStream] = []
        while len(visitors) < count:
            visitors.append(await connect(address(reporter)))
            while relay.tunnel.waiting != len(visitors):
                await trio.lowlevel.checkpoint()
        return visitors


async def assert_served(visitors: list[trio.SocketStream]) -> None:
    for visitor in visitors:
        await visitor.send_all(b"hello")
    for visitor in visitors:
        assert await read_exactly(visitor, 5) == b"hello"


async def test_a_waiting_crowd_causes_ever_more_carriers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two, four: not a round trip for each of them. Once it is served, one at a time again."""
    reporter, rounds = RecordingReporter(wants_visitors=False), DialRounds(monkeypatch, places=4)
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            visitors = await rounds.crowd(relay, reporter, 55)
            rounds.begin.set()
            await assert_served(visitors)
            assert rounds.sizes == [1, 2, 4, 8], "4 on each carrier"
            await assert_served([await connect(address(reporter)) for _ in range(3)])
            await until_carriers(relay, 16)
            assert rounds.sizes == [1, 2, 4, 8, 1]


async def test_a_crowd_does_not_exceed_the_limit_of_carriers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_carriers, "MAX_CARRIERS", 5)
    reporter, rounds = RecordingReporter(wants_visitors=False), DialRounds(monkeypatch, places=2)
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            visitors = await rounds.crowd(relay, reporter, 12)
            rounds.begin.set()
            await assert_served(visitors[:10])
            assert rounds.sizes == [1, 2, 2]
            assert (len(carriers(relay)), relay.tunnel.waiting) == (5, 2)
            for visitor in visitors[:2]:
                await visitor.aclose()
            await assert_served(visitors[10:])


async def test_an_agent_that_is_refused_one_of_several_carriers_starts_with_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A relay that allows fewer carriers is not asked for eight at a time for ever."""
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(backoff, "MAX_DELAY", 0.02)
    reporter, rounds = RecordingReporter(wants_visitors=False), DialRounds(monkeypatch, places=2)
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            webmux = relay.settings.webmux.model_copy(update={"max_carriers": 5})
            relay.settings = relay.settings.model_copy(update={"webmux": webmux})
            visitors = await rounds.crowd(relay, reporter, 12)
            rounds.begin.set()
            await assert_served(visitors[:10])
            await reporter.wait_for("trouble")
            while len(rounds.sizes) < 6:
                await trio.lowlevel.checkpoint()
            assert rounds.sizes[:6] == [1, 2, 4, 1, 1, 1]


# Lost and replaced


async def test_a_lost_carrier_is_replaced_and_the_tunnel_stays() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            visitor = await connect(address(reporter))
            await visitor.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"
            (carrier,) = carriers(relay)
            carrier.close("a test")
            assert await is_dropped(visitor)
            assert await ask(address(reporter), b"again") == b"again"
            assert relay.tunnel.id == "t1"
            assert [event for event, _ in reporter.events if event == "opened"] == ["opened"]


async def test_a_carrier_whose_local_address_is_gone_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network changed: another carrier is dialled at once, not only after a missed heartbeat."""
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter) as exposure,
        ):
            (first,) = await until_carriers(relay, 1)
            exposure.retry_now()
            assert await ask(address(reporter), b"it is still there") == b"it is still there"
            assert carriers(relay) == [first], "it answered, so nothing was dialled"
            monkeypatch.setattr(agent_carrier, "is_local_address", lambda _: False)
            exposure.retry_now()
            assert (await until_carriers(relay, 2))[0] is first
            assert await ask(address(reporter), b"from elsewhere") == b"from elsewhere"


@pytest.mark.interpreted
async def test_an_agent_with_an_old_key_tries_it_once_and_then_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated attempts with a key from before the relay's restart would look like guessing."""
    attempts: list[str | None] = []

    def counting(keys: KeyRegistry, uri: str | None) -> WebMuxServerSide:
        attempts.append(uri)
        return find_side(keys, uri)

    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            await until_carriers(relay, 1)
            monkeypatch.setattr(webmux_shared, "find_side", counting)
            relay.tunnel.close("a test")
            await reporter.wait_for("opened", 2)
            await until_carriers(relay, 1)
            assert await ask(address(reporter), b"again") == b"again"
            assert len(attempts) == 2, "one with the old key, one with the new one"


async def test_a_tunnel_whose_only_agent_withdrew_is_not_ready_and_its_visitor_goes_on() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, reporter) as exposure,
        ):
            await until_carriers(relay, 1)
            stream = await connect(address(reporter))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            session = exposure.session
            assert session is not None
            session.source.withdraw()
            await session.source.wait_withdrawn()
            assert (relay.tunnel.phase.value, relay.tunnel.parked) == ("waiting", 0)
            await stream.send_all(b"after")
            assert await read_exactly(stream, 5) == b"after"
            await stream.aclose()
            await until_carriers(relay, 0)
            session.source.resume()
            await until_carriers(relay, 1)
            assert relay.tunnel.phase.value == "ready"
