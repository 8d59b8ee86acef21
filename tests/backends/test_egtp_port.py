"""The port for EGTP nodes: which nodes get in, which association they go on with, and what others are told."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from tests.agent.support import (
    PATIENCE,
    RecordingReporter,
    RelayHere,
    echo,
    exposed,
    local_server,
    relay_here,
    using_backend,
)
from tests.agent.test_expose import address, ask
from tests.support.peers import connect, is_dropped, read_all, read_exactly
from tunneld.agent.request import TunnelRequest
from tunneld.backends.egtp import EgtpServerSide, derive
from tunneld.backends.egtp_port import load_identity
from tunneld.backends.egtp_relay import place
from tunneld.config.schema import EgtpSettings, Settings
from tunneld.directory.requester import Requester
from tunneld.egtp.handshake import NodeConnection, begin_session
from tunneld.egtp.session import UNKNOWN_NODE
from tunneld.errors import ConfigError, NotAllowedError, RefusedError, RemoteProtocolError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.net.node_id import NodeId
from tunneld.policy.options import TunnelOptions
from tunneld.tls.identity import Identity
from tunneld.wire.egtp.attaching import UNKNOWN_ASSOCIATION, AttachRequest
from tunneld.wire.egtp.delivery import Inbox
from tunneld.wire.egtp.envelope import decode_streams, encode_streams
from tunneld.wire.egtp.messages import MojoRequest, MojoResponse, parse_message
from tunneld.wire.egtp.relaying import MESSAGE_FOR_YOU, parse_mail
from tunneld.wire.egtp.streams import StreamEnded, StreamOpened, Streams
from tunneld.wire.lines import Value

KEY, OTHER = Identity.from_seed(b"\x01" * 32), Identity.from_seed(b"\x02" * 32)
REQUEST = TunnelRequest({"name": "the-one"}, backend="egtp", identity=KEY)
ME = Requester(host="127.0.0.1", owner="127.0.0.1:9", local_host="127.0.0.1")
ATTACH = AttachRequest(b"a" * 20)


@pytest.fixture(autouse=True)
def _egtp() -> Iterator[None]:
    with using_backend("egtp"):
        yield


@asynccontextmanager
async def tunnel() -> AsyncIterator[tuple[RelayHere, Endpoint]]:
    """A relay with a tunnel for the node with `KEY`, without an agent."""
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            options = TunnelOptions(persist=True, node=str(KEY.id))
            opened = await relay.service.open_tunnel("egtp", options, ME)
            yield relay, opened.server_uri


async def node(uri: Endpoint, identity: Identity = KEY, peer: str = "") -> NodeConnection:
    """Connect as a node and begin a session."""
    connection = socket.create_connection((uri.host, uri.port))
    connection.setblocking(False)
    try:
        return await begin_session(connection, identity, NodeId.parse(peer or uri.key))
    except BaseException:
        connection.close()
        raise


async def test_a_node_attaches_and_goes_on_with_its_association() -> None:
    async with tunnel() as (relay, uri):
        (opened,) = relay.service.tunnels()
        first = await node(uri)
        assert await first.ask(ATTACH.encode()) == {b"received": 0, b"result": b"no"}
        assert opened.server_side.live_connections == 1
        second = await node(uri)
        resumed = AttachRequest(ATTACH.association, resumed=True)
        assert await second.ask(resumed.encode()) == {b"received": 0, b"result": b"no"}
        assert opened.server_side.connections == 1
        with pytest.raises(RemoteProtocolError):  # the former link was closed
            await first.receive()
        for connection in (first, second):
            connection.connection.close()


async def test_an_unknown_association_cannot_be_resumed() -> None:
    async with tunnel() as (_, uri):
        there = await node(uri)
        with pytest.raises(RefusedError, match=UNKNOWN_ASSOCIATION):
            await there.ask(AttachRequest(b"b" * 20, resumed=True).encode())
        there.connection.close()


async def test_another_key_is_refused_and_counts_as_a_failure() -> None:
    with capture_logs() as logs:
        async with tunnel() as (relay, uri):
            there = await node(uri, OTHER)
            with pytest.raises(RefusedError, match=f"node {OTHER.id} may not serve this tunnel"):
                await there.ask(ATTACH.encode())
            there.connection.close()
            (opened,) = relay.service.tunnels()
            assert opened.server_side.connections == 0
    assert f"node {OTHER.id} may not serve this tunnel" in [entry.get("reason") for entry in logs]


async def test_an_id_that_no_tunnel_has_is_rejected() -> None:
    async with tunnel() as (_, uri):
        with pytest.raises(RemoteProtocolError, match=UNKNOWN_NODE):
            await node(uri, peer=str(OTHER.id))


async def test_a_relay_with_another_key_is_refused_by_the_agent() -> None:
    """The port answers with the certificate of the tunnel that was asked for; here a different one."""
    async with tunnel() as (relay, uri):
        (opened,) = relay.service.tunnels()
        side = opened.server_side
        assert isinstance(side, EgtpServerSide)
        side.identity = OTHER
        with pytest.raises((RemoteProtocolError, NotAllowedError)):
            await node(uri)


@pytest.mark.parametrize("garbage", [b"\0\0\0\x04abcd", b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n", bytes(4)])
async def test_garbage_costs_its_own_connection(garbage: bytes) -> None:
    async with tunnel() as (_, uri):
        stream = await trio.open_tcp_stream(uri.host, uri.port)
        await stream.send_all(garbage)
        assert await is_dropped(stream)
        await stream.aclose()
        there = await node(uri)
        await there.ask(ATTACH.encode())
        there.connection.close()


async def test_other_requests_are_answered_with_a_failure() -> None:
    async with tunnel() as (_, uri):
        there = await node(uri)
        with pytest.raises(RefusedError, match="association, received or resumed is missing"):
            await there.ask({b"enable fast relay": 1, b"response version": 3})
        there.connection.close()


async def test_the_backend_requires_a_node() -> None:
    async with relay_here() as relay:
        with pytest.raises(UsageError, match="requires node=ID"):
            await relay.service.open_tunnel("egtp", TunnelOptions(), ME)


async def test_agents_share_a_tunnel_each_with_its_own_key() -> None:
    shared: dict[str, Value] = {"name": "the-one", "share": True}
    with trio.fail_after(PATIENCE):
        async with local_server(echo) as target, relay_here() as relay:
            reporters = RecordingReporter(), RecordingReporter()
            requests = (TunnelRequest(shared, backend="egtp", identity=key) for key in (KEY, OTHER))
            async with (
                exposed(target, relay.access, reporters[0], next(requests)),
                exposed(target, relay.access, reporters[1], next(requests)),
            ):
                (opened,) = relay.service.tunnels()
                while opened.server_side.live_connections < 2:
                    await trio.lowlevel.checkpoint()
                assert await ask(address(reporters[0]), b"hello") == b"hello"


async def test_a_visitor_survives_the_loss_of_the_agents_connection() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            local_server(echo) as target,
            relay_here() as relay,
            exposed(target, relay.access, reporter, REQUEST),
        ):
            visitor = await connect(address(reporter))
            await visitor.send_all(b"before")
            assert await read_exactly(visitor, 6) == b"before"
            (opened,) = relay.service.tunnels()
            side = opened.server_side
            assert isinstance(side, EgtpServerSide)
            for number in range(3):
                (carrier,) = side.associations.values()
                assert carrier.attachment.output.link is not None
                carrier.attachment.output.link._end("cut by the test")
                await visitor.send_all(b"after%d" % number)
                assert await read_exactly(visitor, 6) == b"after%d" % number
            await visitor.aclose()
            assert opened.served == 1
            assert reporter.all("trouble") == []


async def test_visitors_are_cut_if_the_relay_has_forgotten_the_association() -> None:
    reporter = RecordingReporter()
    with trio.fail_after(PATIENCE):
        async with (
            local_server(echo) as target,
            relay_here() as relay,
            exposed(target, relay.access, reporter, REQUEST),
        ):
            visitor = await connect(address(reporter))
            await visitor.send_all(b"before")
            assert await read_exactly(visitor, 6) == b"before"
            (opened,) = relay.service.tunnels()
            side = opened.server_side
            assert isinstance(side, EgtpServerSide)
            (carrier,) = side.associations.values()
            link = carrier.attachment.output.link
            assert link is not None
            carrier.attachment.output.link = None
            carrier.end("forgotten")  # without a goodbye
            link._end("cut by the test")
            with pytest.raises(trio.BrokenResourceError):
                await visitor.receive_some()
            assert await ask(address(reporter), b"hello") == b"hello"


# Nodes that poll


class PollingNode:
    """A node that connects, sends and fetches what there is, and disconnects."""

    def __init__(self, uri: Endpoint) -> None:
        self.uri = uri
        self.streams = Streams(initiator=True)
        self.inbox = Inbox()
        self.number = 0
        self.resumed = False
        self.received = b""
        self.opened: list[int] = []
        self.ended: list[int] = []

    async def poll(self) -> None:
        there = await node(self.uri)
        request = AttachRequest(ATTACH.association, self.resumed, self.inbox.next, fast_relay=False)
        self.resumed = True
        for envelope in parse_mail({b"messages": await there.ask(request.encode())}).messages:
            number, frames = decode_streams(memoryview(envelope))
            for ready in self.inbox.receive(number, frames) or ():
                self.streams.receive(ready)
        for item in self.streams.parse(1000):
            match item:
                case StreamOpened(sid):
                    self.opened.append(sid)
                case StreamEnded(sid):
                    self.ended.append(sid)
                case (_, data):
                    self.received += bytes(data)
                case _:
                    pass
        there.connection.close()

    async def send(self) -> None:
        there = await node(self.uri)
        await there.ask(AttachRequest(ATTACH.association, self.resumed, self.inbox.next, fast_relay=False).encode())
        envelope = encode_streams(self.number, self.streams.outgoing)
        self.number += 1
        self.streams.outgoing.clear()
        peer = there.session.peer
        assert peer is not None
        await there.send(MojoRequest(MESSAGE_FOR_YOU, peer.digest, b"n" * 20, {b"message": envelope}).encode())
        response = parse_message(await there.receive())
        assert isinstance(response, MojoResponse)
        assert (response.reference, response.body) == (b"n" * 20, {b"result": b"success"})
        there.connection.close()


async def test_a_node_that_cannot_hold_a_connection_polls() -> None:
    async with tunnel() as (relay, uri):
        there = PollingNode(uri)
        await there.poll()
        (opened,) = relay.service.tunnels()
        visitor = await connect(opened.client_uri)
        await visitor.send_all(b"question")
        await visitor.send_eof()
        while not there.ended:
            await there.poll()
        assert there.opened == [2]
        assert there.received == b"question"
        there.streams.send(there.streams.streams[2], memoryview(b"answer"))
        there.streams.finish(2)
        await there.send()
        assert await read_all(visitor) == b"answer"
        await there.poll()
        assert there.received == b"question"


# The key


def test_the_key_is_created_once_and_kept(tmp_path: Path) -> None:
    settings = Settings.model_validate({"daemon": {"state": tmp_path}})
    assert place(settings) == tmp_path / "egtp_key"
    made = load_identity(place(settings))
    assert load_identity(place(settings)) == made
    assert place(settings).stat().st_mode & 0o777 == 0o600
    own = Settings.model_validate({"egtp": {"identity": tmp_path / "own"}})
    assert place(own) == tmp_path / "own"


def test_a_key_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("no key")
    with pytest.raises(ConfigError):
        load_identity(tmp_path / "key")
    with pytest.raises(ConfigError):
        load_identity(tmp_path / "key" / "below")
    monkeypatch.setattr("tunneld.backends.egtp_relay.state_folder", lambda: None)
    with pytest.raises(ConfigError, match=r"set egtp\.identity or daemon\.state"):
        place(Settings())


def test_keys_of_tunnels_depend_on_the_relays_key_and_on_their_salt() -> None:
    assert derive(KEY, "a") == derive(KEY, "a")
    assert len({derive(key, salt).id for key in (KEY, OTHER) for salt in "ab"}) == 4


async def test_a_tunnel_with_a_name_keeps_its_node_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another process with the same key, and not for another owner."""
    uris = []
    monkeypatch.setattr("tests.agent.support.Identity.create", lambda: OTHER)  # the relay's key
    other = Requester(host="127.0.0.2", owner="127.0.0.2:9", local_host="127.0.0.1")
    for requester, name in ((ME, "web"), (ME, "web"), (other, "web"), (ME, "another"), (ME, ""), (ME, "")):
        async with relay_here() as relay:
            options = TunnelOptions(persist=True, node=str(KEY.id), name=name)
            uris.append((await relay.service.open_tunnel("egtp", options, requester)).server_uri.key)
    assert uris[0] == uris[1]
    assert len(set(uris[1:])) == 5


async def test_all_nodes_of_an_owner_share_what_may_be_kept() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            budgets = []
            for number, kept in enumerate((65536, 131072, 131072)):
                relay.settings = relay.settings.model_copy(update={"egtp": EgtpSettings(kept_memory=kept)})
                options = TunnelOptions(persist=True, node=str(KEY.id), name=f"tunnel-{number % 2}")
                uri = (await relay.service.open_tunnel("egtp", options, ME)).server_uri
                there = await node(uri)
                await there.ask(AttachRequest(bytes([number]) * 20).encode())
                for tunnel in relay.service.tunnels():
                    assert isinstance(tunnel.server_side, EgtpServerSide)
                    for carrier in tunnel.server_side.associations.values():
                        budgets.append((carrier.attachment.output._budget, kept))
                        assert carrier.attachment.output._budget.limit == kept
                there.connection.close()
            assert len({id(budget) for budget, _ in budgets}) == 1
