"""The shared webmux port of a relay, and carriers of peers that are not the agent: too early, too many, not allowed."""

from __future__ import annotations

import socket
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from tests.agent.support import PATIENCE, RecordingReporter, echo, exposed, local_server, relay_here, using_backend
from tests.agent.test_carriers import carriers, until_carriers
from tests.agent.test_expose import address, ask
from tests.engine.bench import stream
from tests.support.hidden_servers import start_handshakes
from tests.support.peers import connect
from tests.support.pki import Pki
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthLimiter
from tunneld.backends.webmux_port import serve_carriers
from tunneld.config.schema import ControlSettings, WebMuxSettings
from tunneld.directory.requester import Requester
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.mux.carrier import PREAUTH_EXCEEDED
from tunneld.net.endpoint import Endpoint
from tunneld.net.listeners import ReloadableListener
from tunneld.net.sockets import bind_tcp
from tunneld.policy.options import TunnelOptions
from tunneld.tls.connection import HANDSHAKE, PEER_CLOSED
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tunnel import Phase
from tunneld.wire.webmux.events import Opened, SessionRefused
from tunneld.wire.webmux.mux import Mux


@pytest.fixture(autouse=True)
def _webmux() -> Iterator[None]:
    with using_backend("webmux"):
        yield


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.issue(tmp_path_factory.mktemp("pki"))


class RawWebMuxPeer:
    """A peer that speaks WebMUX with the shared port by hand."""

    def __init__(self, uri: Endpoint) -> None:
        self.mux = Mux(initiator=True)
        self.stream = stream(socket.create_connection((uri.host, uri.port)))
        self.items: list[object] = []

    async def define_uri(self, uri: str) -> None:
        self.mux.define_endpoint(self.mux.intern_atom(0, uri))
        await self.flush()

    async def flush(self) -> None:
        data = bytes(self.mux.outgoing)
        self.mux.outgoing.clear()
        await self.stream.send_all(data)

    async def receive(self) -> list[object]:
        """Return what arrives next; an empty list at the end."""
        try:
            data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            return []
        return [item if not isinstance(item, tuple) else bytes(item[1]) for item in self.mux.receive(data)]


async def test_a_new_carrier_gets_the_visitors_although_the_old_one_seems_alive() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target, exposed(target, relay.access, reporter):
            (first,) = await until_carriers(relay, 1)
            hung = RawWebMuxPeer(relay.tunnel.server_uri)  # like a carrier of a lost network: it never answers
            await hung.define_uri(str(relay.tunnel.server_uri))
            await until_carriers(relay, 2)
            first.heartbeat.ping_now()
            while first.heartbeat.awaiting_reply and not first.heartbeat.received:
                await trio.lowlevel.checkpoint()
            carriers(relay)[1].heartbeat.ping_now()
            for _ in range(5):
                assert await ask(address(reporter), b"served") == b"served"
            await hung.stream.aclose()


async def test_a_peer_that_leaves_during_the_handshake_is_logged_and_is_not_a_failed_login(pki: Pki) -> None:
    refused: list[MutableMapping[str, Any]] = []
    with trio.fail_after(PATIENCE), capture_logs() as lines:
        async with (
            relay_here(pki=pki) as relay,
            local_server(echo) as target,
            exposed(target, relay.access, RecordingReporter()),
        ):
            peer = await connect(relay.tunnel.server_uri)
            await peer.send_all(HANDSHAKE)
            await peer.aclose()
            while not refused:
                await trio.lowlevel.checkpoint()
                refused = [line for line in lines if line["event"] == "hidden server refused"]
    assert [(line["service"], line["reason"]) for line in refused] == [("webmux", PEER_CLOSED)]
    assert not [line for line in lines if line["event"] == "authentication failed"]


async def test_a_peer_that_sends_much_before_its_uri_is_closed_and_is_a_failed_login() -> None:
    """An unauthenticated peer must not keep the relay busy with small fragments."""
    with trio.fail_after(PATIENCE), capture_logs() as lines:
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, RecordingReporter()),
        ):
            await until_carriers(relay, 1)
            peer = RawWebMuxPeer(relay.tunnel.server_uri)
            with suppress(trio.BrokenResourceError):
                for _ in range(100):
                    peer.mux.noop(bytes(1000))
                    await peer.flush()
            while await peer.receive():
                pass
            await peer.stream.aclose()
            assert len(carriers(relay)) == 1
    failures = [line for line in lines if line["event"] == "authentication failed"]
    assert [(line["service"], line["reason"]) for line in failures] == [("webmux", PREAUTH_EXCEEDED)]


async def test_the_relay_opens_channels_with_the_port_of_the_client_side_and_accepts_none() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, RecordingReporter()),
        ):
            await until_carriers(relay, 1)
            peer = RawWebMuxPeer(relay.tunnel.server_uri)
            await peer.define_uri(f"webmux://another.name:1/{relay.tunnel.server_uri.key}")  # only the key matters
            session = peer.mux.open(80)
            await peer.flush()
            while not any(
                isinstance(item, SessionRefused) and item.session == session for item in await peer.receive()
            ):
                pass
            while any(each.heartbeat.awaiting_reply and not each.heartbeat.received for each in carriers(relay)):
                await trio.lowlevel.checkpoint()
            visitor = await connect(relay.tunnel.client_uri)  # of two idle carriers, the newest gets it
            opened: list[Opened] = []
            while not opened:
                opened = [item for item in await peer.receive() if isinstance(item, Opened) and item.protocol]
            assert opened[0].protocol == relay.tunnel.client_uri.port
            assert opened[0].session % 2 == 1
            await peer.stream.aclose()
            await visitor.aclose()


async def test_a_tunnel_whose_hidden_server_does_not_answer_is_not_ready() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, RecordingReporter()),
        ):
            (carrier,) = await until_carriers(relay, 1)
            phases = [relay.tunnel.phase]
            carrier.heartbeat.unresponsive, carrier.heartbeat.received = True, False
            phases.append(relay.tunnel.phase)
            carrier.heartbeat.received = True
            phases.append(relay.tunnel.phase)
            assert phases == [Phase.READY, Phase.WAITING, Phase.READY]


@pytest.mark.parametrize("uri", ["webmux://x:1/wrong", "webmux://x:1", "not a uri", "tcp://127.0.0.1:1"])
async def test_a_peer_that_names_no_open_tunnel_is_closed(uri: str) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, RecordingReporter()),
        ):
            peer = RawWebMuxPeer(relay.tunnel.server_uri)
            await peer.define_uri(uri)
            while await peer.receive():
                pass
            assert len(await until_carriers(relay, 1)) == 1
            await peer.stream.aclose()


async def test_a_carrier_beyond_the_limit_is_refused_unless_another_does_not_answer() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            exposed(target, relay.access, RecordingReporter()),
        ):
            (first,) = await until_carriers(relay, 1)
            webmux = relay.settings.webmux.model_copy(update={"max_carriers": 1})
            relay.settings = relay.settings.model_copy(update={"webmux": webmux})
            second = RawWebMuxPeer(relay.tunnel.server_uri)
            await second.define_uri(str(relay.tunnel.server_uri))
            while await second.receive():
                pass
            assert await until_carriers(relay, 1) == [first]
            first.heartbeat.unresponsive, first.heartbeat.received = True, False
            third = RawWebMuxPeer(relay.tunnel.server_uri)
            await third.define_uri(str(relay.tunnel.server_uri))
            while await until_carriers(relay, 1) == [first]:
                await trio.lowlevel.checkpoint()
            for each in (second, third):
                await each.stream.aclose()


async def test_a_carrier_from_an_address_outside_server_from_is_refused() -> None:
    """Matters without TLS, where the key can be overheard."""
    requester = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
    options = TunnelOptions.parse({"persist": "yes", "server_from": "192.0.2.0/24"})
    with trio.fail_after(PATIENCE), capture_logs() as lines:
        async with relay_here() as relay:
            tunnel = await relay.service.open_tunnel("webmux", options, requester)
            peer = RawWebMuxPeer(tunnel.server_uri)
            await peer.define_uri(str(tunnel.server_uri))
            while await peer.receive():
                pass
            await peer.stream.aclose()
            assert carriers(relay) == []
    failures = [line["reason"] for line in lines if line["event"] == "authentication failed"]
    assert failures == ["only 192.0.2.0/24 may connect as the hidden server"]


@pytest.mark.parametrize("encrypted", [False, True])
async def test_abandoned_handshakes_are_penalised_and_probes_are_not(
    engine: Engine, nursery: trio.Nursery, pki: Pki, encrypted: bool
) -> None:
    assert isinstance(engine, Pump)
    settings = ControlSettings(abandoned_handshakes="5/h")
    authenticator = Authenticator(lambda: (), PreauthLimiter(lambda: settings, exempt=lambda _host: False))
    handshakes = await start_handshakes(nursery, pki if encrypted else None, authenticator)
    listener = ReloadableListener("webmux", bind_tcp("127.0.0.1", 0))
    await nursery.start(serve_carriers, listener, WebMuxSettings, handshakes, KeyRegistry(), engine)

    async def leave(after: bytes) -> None:
        async with await connect(Endpoint("tcp", "127.0.0.1", listener.port)) as peer:
            await peer.send_all(after)
        await wait_all_tasks_blocked(0.005)

    hello = HANDSHAKE + b"\x03\x01" if encrypted else b"x"
    for data in [b""] * 20 + [hello] * 7:
        await leave(data)
    assert authenticator.penalty("127.0.0.1") == 0
    await leave(hello)
    assert authenticator.penalty("127.0.0.1") > 0
