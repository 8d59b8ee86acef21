"""Agents on carriers: in TLS, several at once, lost and found; and what the relay thinks of strange ones."""

from __future__ import annotations

import socket
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tests.agent.support import BACKEND, PATIENCE, RelayHere, Told, echo, exposed, local_server, relay_here
from tests.agent.test_expose import address, ask
from tests.engine.bench import stream
from tests.support.papers import Papers
from tests.support.people import connect, is_dropped, read_exactly
from tunneld.agent import backoff, request
from tunneld.agent import carriers as agent_carriers
from tunneld.agent.access import RelayAccess
from tunneld.agent.request import TunnelRequest
from tunneld.backends import webmux_port as relay_carriers
from tunneld.backends.webmux import WebMuxServerSide, find_side
from tunneld.directory.service import Requester
from tunneld.errors import RefusedError, UsageError
from tunneld.mux import carrier as session_carrier
from tunneld.mux.carrier import PREAUTH_EXCEEDED, Carrier
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import TunnelOptions
from tunneld.tls.connection import HANDSHAKE, TlsSocket
from tunneld.tls.contexts import client_tls_context
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tunnel import Phase
from tunneld.wire.webmux.events import Opened, SessionRefused
from tunneld.wire.webmux.mux import Mux


@pytest.fixture(autouse=True)
def _webmux() -> Iterator[None]:
    token = BACKEND.set("webmux")
    yield
    BACKEND.reset(token)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.issue(tmp_path_factory.mktemp("papers"))


def carriers(relay: RelayHere) -> list[Carrier]:
    """Those of the only tunnel."""
    side = relay.tunnel._server_side
    assert isinstance(side, WebMuxServerSide)
    return [carrier for carrier in side.carriers if isinstance(carrier, Carrier)]


async def until(relay: RelayHere, count: int) -> list[Carrier]:
    while len(carriers(relay)) != count:
        await trio.lowlevel.checkpoint()
    return carriers(relay)


# In TLS


@pytest.mark.parametrize("trust", ["authority", "pin"])
async def test_everything_between_agent_and_relay_is_in_tls(papers: Papers, trust: str) -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here(papers=papers) as relay, local_server(echo) as target:
            access = relay.access
            if trust == "pin":
                access = RelayAccess(access.where, client_tls_context(pin=papers.pin), timeout=PATIENCE)
            async with exposed(target, access, told):
                assert relay.tunnel.server_uri.scheme == "webmuxs"
                assert await ask(address(told), b"x" * 300_000) == b"x" * 300_000


async def test_encryption_is_not_lost_without_a_word(papers: Papers) -> None:
    BACKEND.set("tcp")  # the relay has no webmux
    with trio.fail_after(PATIENCE):
        async with relay_here(papers=papers) as relay, local_server(echo) as target:
            for options, scheme in (({}, "tls"), ({"secure": "key"}, "tcp"), ({"secure": "no"}, "tcp")):
                told = Told()
                async with exposed(target, relay.access, told, TunnelRequest(options)):
                    server = relay.tunnel.server_uri
                    assert (server.scheme, bool(server.key)) == (scheme, options != {"secure": "no"})
                    assert await ask(address(told), b"meant") == b"meant"


async def test_a_system_that_cannot_encrypt_says_so(papers: Papers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "HAS_CARRIERS", False)
    with trio.fail_after(PATIENCE):
        async with relay_here(papers=papers) as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(UsageError, match="--secure no"), flatten_subgroups=True):
                async with exposed(target, relay.access, Told()):
                    pass


async def test_a_wrong_option_is_not_taken_for_a_missing_backend(papers: Papers) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here(papers=papers) as relay, local_server(echo) as target:
            with pytest.RaisesGroup(pytest.RaisesExc(RefusedError, match="max_visitors"), flatten_subgroups=True):
                async with exposed(target, relay.access, Told(), TunnelRequest({"max_visitors": "0"})):
                    pass


# Many


async def test_hundreds_of_visitors_at_once_bring_further_carriers_and_all_are_served() -> None:
    told = Told(wants_visitors=False)
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo, backlog=1000) as target,
            exposed(target, relay.access, told),
        ):
            visitors = [await connect(address(told)) for _ in range(300)]
            for number, visitor in enumerate(visitors):
                await visitor.send_all(b"%05d" % number)
            for number, visitor in enumerate(visitors):
                assert await read_exactly(visitor, 5) == b"%05d" % number
            assert len(carriers(relay)) >= 3
            loads = [len(carrier.channels) for carrier in carriers(relay)]
            assert sum(loads) == 300
            assert not told.all("failed")


class Rounds:
    """Carriers of few places, dialled only once a crowd waits; `sizes` has how many were dialled at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, places: int) -> None:
        self.sizes: list[int] = []
        self.begin = trio.Event()
        self._together = 0
        self._really_dial = RelayAccess.dial_carrier
        monkeypatch.setattr(session_carrier, "MAX_CHANNELS", places)
        monkeypatch.setattr(agent_carriers, "NEARLY_FULL", places - 1)

        async def dial(access: RelayAccess, uri: Endpoint) -> socket.socket | TlsSocket:
            return await self._dial(access, uri)

        monkeypatch.setattr(RelayAccess, "dial_carrier", dial)

    async def _dial(self, access: RelayAccess, uri: Endpoint) -> socket.socket | TlsSocket:
        """Who dials in the same round begins in the same turn of the scheduler."""
        self._together += 1
        await self.begin.wait()
        await trio.lowlevel.checkpoint()
        if self._together:
            self.sizes.append(self._together)
            self._together = 0
        return await self._really_dial(access, uri)

    async def crowd(self, relay: RelayHere, told: Told, count: int) -> list[trio.SocketStream]:
        """So many visitors, all of whom wait by now."""
        visitors = [await connect(address(told)) for _ in range(count)]
        while relay.tunnel.waiting != count:
            await trio.lowlevel.checkpoint()
        return visitors


async def served(visitors: list[trio.SocketStream]) -> None:
    for visitor in visitors:
        await visitor.send_all(b"hello")
    for visitor in visitors:
        assert await read_exactly(visitor, 5) == b"hello"


async def test_a_crowd_that_waits_brings_ever_more_carriers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two, four: not a round trip for each of them. And when it is served, one at a time again."""
    told, rounds = Told(wants_visitors=False), Rounds(monkeypatch, places=4)
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            visitors = await rounds.crowd(relay, told, 55)
            rounds.begin.set()
            await served(visitors)
            assert rounds.sizes == [1, 2, 4, 8], "4 on each carrier"
            await served([await connect(address(told)) for _ in range(3)])
            await until(relay, 16)
            assert rounds.sizes == [1, 2, 4, 8, 1]


async def test_a_crowd_does_not_make_more_carriers_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_carriers, "MAX_CARRIERS", 5)
    told, rounds = Told(wants_visitors=False), Rounds(monkeypatch, places=2)
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            visitors = await rounds.crowd(relay, told, 12)
            rounds.begin.set()
            await served(visitors[:10])
            assert rounds.sizes == [1, 2, 2]
            assert (len(carriers(relay)), relay.tunnel.waiting) == (5, 2)
            for visitor in visitors[:2]:
                await visitor.aclose()
            await served(visitors[10:])


async def test_who_is_refused_a_carrier_of_several_begins_with_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that allows fewer than we would like is not asked for eight at a time for ever."""
    monkeypatch.setattr(backoff.delays, "__kwdefaults__", {"first": 0.01, "longest": 0.02})
    told, rounds = Told(wants_visitors=False), Rounds(monkeypatch, places=2)
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            webmux = relay.settings.webmux.model_copy(update={"max_carriers": 5})
            relay.settings = relay.settings.model_copy(update={"webmux": webmux})
            visitors = await rounds.crowd(relay, told, 12)
            rounds.begin.set()
            await served(visitors[:10])
            await told.wait_for("trouble")
            while len(rounds.sizes) < 6:
                await trio.lowlevel.checkpoint()
            assert rounds.sizes[:6] == [1, 2, 4, 1, 1, 1]


# Lost and found


async def test_a_lost_carrier_is_replaced_and_the_tunnel_stays() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            visitor = await connect(address(told))
            await visitor.send_all(b"hello")
            assert await read_exactly(visitor, 5) == b"hello"
            (carrier,) = carriers(relay)
            carrier.close("a test")
            assert await is_dropped(visitor)
            assert await ask(address(told), b"again") == b"again"
            assert relay.tunnel.id == "t1"
            assert [event for event, _ in told.events if event == "opened"] == ["opened"]


async def test_a_carrier_whose_address_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network changed: another carrier is dialled beside it at once, not when the heartbeat is missed."""
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told) as exposure:
            (first,) = await until(relay, 1)
            exposure.hurry()
            assert await ask(address(told), b"it is still there") == b"it is still there"
            assert carriers(relay) == [first], "and it answered, so nothing was dialled"
            monkeypatch.setattr(agent_carriers, "is_ours", lambda _: False)
            exposure.hurry()
            assert (await until(relay, 2))[0] is first
            assert await ask(address(told), b"from elsewhere") == b"from elsewhere"


async def test_an_agent_that_the_relay_does_not_know_knocks_once_and_then_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Knocking again and again with a key from before the relay's restart looks like guessing."""
    knocks: list[str | None] = []

    def counting(endpoints: KeyRegistry, uri: str | None) -> WebMuxServerSide:
        knocks.append(uri)
        return find_side(endpoints, uri)

    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            await until(relay, 1)
            monkeypatch.setattr(relay_carriers, "find_side", counting)
            relay.tunnel.close("a test")
            await told.wait_for("opened", 2)
            await until(relay, 1)
            assert await ask(address(told), b"again") == b"again"
            assert len(knocks) == 2, "one with the key of old, one with the new one"


class Stranger:
    """Somebody who speaks WebMUX with the shared port by hand."""

    def __init__(self, uri: Endpoint) -> None:
        self.mux = Mux(initiator=True)
        self.stream = stream(socket.create_connection((uri.host, uri.port)))
        self.items: list[object] = []

    async def define(self, uri: str) -> None:
        self.mux.define_endpoint(self.mux.intern_atom(0, uri))
        await self.flush()

    async def flush(self) -> None:
        data = bytes(self.mux.outgoing)
        self.mux.outgoing.clear()
        await self.stream.send_all(data)

    async def hear(self) -> list[object]:
        """What comes next; nothing at the end."""
        try:
            data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            return []
        return [item if not isinstance(item, tuple) else bytes(item[1]) for item in self.mux.receive(data)]


async def test_who_comes_back_gets_the_visitors_although_its_old_carrier_seems_to_stand() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told):
            (first,) = await until(relay, 1)
            hung = Stranger(relay.tunnel.server_uri)  # what a lost network leaves: nobody answers there
            await hung.define(str(relay.tunnel.server_uri))
            await until(relay, 2)
            first.heartbeat.ping_now()
            while first.heartbeat.awaiting_reply and not first.heartbeat.received:
                await trio.lowlevel.checkpoint()
            carriers(relay)[1].heartbeat.ping_now()
            for _ in range(5):
                assert await ask(address(told), b"served") == b"served"
            await hung.stream.aclose()


async def test_who_leaves_in_the_handshake_is_told_as_that_and_has_not_failed(papers: Papers) -> None:
    refused: list[MutableMapping[str, Any]] = []
    with trio.fail_after(PATIENCE), capture_logs() as lines:
        async with (
            relay_here(papers=papers) as relay,
            local_server(echo) as target,
            exposed(target, relay.access, Told()),
        ):
            stranger = await connect(relay.tunnel.server_uri)
            await stranger.send_all(HANDSHAKE)
            await stranger.aclose()
            while not refused:
                await trio.lowlevel.checkpoint()
                refused = [line for line in lines if line["event"] == "hidden server refused"]
    assert [(line["service"], line["reason"]) for line in refused] == [("webmux", "it hung up")]
    assert not [line for line in lines if line["event"] == "authentication failed"]


async def test_who_talks_and_does_not_say_whose_it_is_is_cut_off_and_has_failed() -> None:
    """A stranger who sends nothing but small fragments would have the relay do nothing else."""
    with trio.fail_after(PATIENCE), capture_logs() as lines:
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, Told()):
            await until(relay, 1)
            here = Stranger(relay.tunnel.server_uri)
            with suppress(trio.BrokenResourceError):
                for _ in range(100):
                    here.mux.noop(bytes(1000))
                    await here.flush()
            while await here.hear():
                pass
            await here.stream.aclose()
            assert len(carriers(relay)) == 1
    failures = [line for line in lines if line["event"] == "authentication failed"]
    assert [(line["service"], line["reason"]) for line in failures] == [("webmux", PREAUTH_EXCEEDED)]


async def test_the_relay_calls_back_with_the_port_of_the_client_side_and_serves_nothing_itself() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, Told()):
            await until(relay, 1)
            here = Stranger(relay.tunnel.server_uri)
            await here.define(f"webmux://another.name:1/{relay.tunnel.server_uri.key}")  # only the key counts
            session = here.mux.open(80)
            await here.flush()
            while not any(isinstance(item, SessionRefused) and item.session == session for item in await here.hear()):
                pass
            while any(each.heartbeat.awaiting_reply and not each.heartbeat.received for each in carriers(relay)):
                await trio.lowlevel.checkpoint()
            visitor = await connect(relay.tunnel.client_uri)  # of two that are idle, the newest gets it
            opened: list[Opened] = []
            while not opened:
                opened = [item for item in await here.hear() if isinstance(item, Opened) and item.protocol]
            assert opened[0].protocol == relay.tunnel.client_uri.port
            assert opened[0].session % 2 == 1
            await here.stream.aclose()
            await visitor.aclose()


async def test_a_tunnel_whose_hidden_server_does_not_answer_is_not_ready() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, Told()):
            (carrier,) = await until(relay, 1)
            phases = [relay.tunnel.phase]
            carrier.heartbeat.unresponsive, carrier.heartbeat.received = True, False
            phases.append(relay.tunnel.phase)
            carrier.heartbeat.received = True
            phases.append(relay.tunnel.phase)
            assert phases == [Phase.READY, Phase.WAITING, Phase.READY]


@pytest.mark.parametrize("uri", ["webmux://x:1/wrong", "webmux://x:1", "not a uri", "tcp://127.0.0.1:1"])
async def test_who_names_no_open_tunnel_is_hung_up_on(uri: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, Told()):
            stranger = Stranger(relay.tunnel.server_uri)
            await stranger.define(uri)
            while await stranger.hear():
                pass
            assert len(await until(relay, 1)) == 1
            await stranger.stream.aclose()


async def test_a_tunnel_whose_only_agent_withdrew_is_not_called_ready_and_its_visitor_goes_on() -> None:
    told = Told()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, told) as exposure:
            await until(relay, 1)
            stream = await connect(address(told))
            await stream.send_all(b"before")
            assert await read_exactly(stream, 6) == b"before"
            keeper = exposure._keeper
            assert keeper is not None
            keeper.supply.withdraw()
            await keeper.supply.wait_withdrawn()
            assert (relay.tunnel.phase.value, relay.tunnel.parked) == ("waiting", 0)
            await stream.send_all(b"after")
            assert await read_exactly(stream, 5) == b"after"
            await stream.aclose()
            await until(relay, 0)
            keeper.supply.resume()
            await until(relay, 1)
            assert relay.tunnel.phase.value == "ready"


async def test_a_carrier_beyond_the_limit_is_refused_unless_another_does_not_answer(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, Told()):
            (first,) = await until(relay, 1)
            webmux = relay.settings.webmux.model_copy(update={"max_carriers": 1})
            relay.settings = relay.settings.model_copy(update={"webmux": webmux})
            second = Stranger(relay.tunnel.server_uri)
            await second.define(str(relay.tunnel.server_uri))
            while await second.hear():
                pass
            assert await until(relay, 1) == [first]
            first.heartbeat.unresponsive, first.heartbeat.received = True, False
            third = Stranger(relay.tunnel.server_uri)
            await third.define(str(relay.tunnel.server_uri))
            while await until(relay, 1) == [first]:
                await trio.lowlevel.checkpoint()
            for each in (second, third):
                await each.stream.aclose()


async def test_a_carrier_from_where_hidden_servers_may_not_come_is_not_taken() -> None:
    """In plain text, where whoever overheard the key has it."""
    asker = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
    options = TunnelOptions.parse({"persist": "yes", "server_from": "192.0.2.0/24"})
    with trio.fail_after(PATIENCE), capture_logs() as lines:
        async with relay_here() as relay:
            tunnel = await relay.service.open_tunnel("webmux", options, asker)
            here = Stranger(tunnel.server_uri)
            await here.define(str(tunnel.server_uri))
            while await here.hear():
                pass
            await here.stream.aclose()
            assert carriers(relay) == []
    failures = [line["reason"] for line in lines if line["event"] == "authentication failed"]
    assert failures == ["only 192.0.2.0/24 may connect as the hidden server"]
