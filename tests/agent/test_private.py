"""The exposing end of a private tunnel, and visitors that mean no good."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.agent.support import PATIENCE, RecordingReporter
from tests.engine.bench import open_descriptors, stream, tcp_pair
from tests.support.private import ALICE, BOB, CAROL, make_home
from tunneld.agent.config import PrivateSettings
from tunneld.agent.private import (
    MAX_PENDING,
    MAX_SESSIONS,
    PREAMBLE_TIMEOUT,
    PrivateVisitors,
    context_for,
    protocol_of,
)
from tunneld.agent.private_carrier import RETIRED, STREAM_PROTOCOL
from tunneld.agent.source import SocketVisitor, VisitorConnection
from tunneld.engine.limits import EngineLimits
from tunneld.engine.portable import PortableEngine
from tunneld.engine.pump import Pump
from tunneld.errors import UsageError
from tunneld.tls.connection import TlsSocket
from tunneld.tls.identity import Identity, peer_context
from tunneld.tls.stream import TlsStream
from tunneld.wire.preamble import CERTIFICATE, REFUSAL, PreambleMessage, encode_certificate, parse_preamble
from tunneld.wire.webmux.events import EndpointDefined, Event, Opened, Reset, SessionRefused
from tunneld.wire.webmux.mux import Mux

HEADER = b"the PROXY header"


@dataclass
class Host:
    """Alice's end, which admits bob, and what became of its visitors."""

    engine: Pump
    reporter: RecordingReporter
    visitors: list[VisitorConnection] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = PrivateSettings("shell", ("bob",))
        take, fail = self.visitors.append, self.failures.append
        self.end = PrivateVisitors(
            self.engine, settings, self.reporter, lambda one, _header: take(one), lambda _header, why: fail(why)
        )

    def take(self) -> trio.SocketStream:
        """A new visitor; returns its far side."""
        far, near = tcp_pair()
        self.end.take(SocketVisitor(near), HEADER)
        return stream(far)


@pytest.fixture
async def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    make_home(tmp_path, monkeypatch)
    ALICE.save(tmp_path / "config/tunneld/identity.pem")
    before = open_descriptors()
    pump = Pump(EngineLimits())
    async with trio.open_nursery() as nursery:
        await nursery.start(pump.run)
        yield Host(pump, RecordingReporter())
        nursery.cancel_scope.cancel()
    assert open_descriptors() == before


async def message_of(far: trio.SocketStream) -> tuple[PreambleMessage, bytes]:
    """The host's message, and what came behind it."""
    received = b""
    while (message := parse_preamble(received)) is None:
        data = await far.receive_some()
        assert data, "it closed without a message"
        received += data
    return message, received[message.size :]


async def handshake(far: trio.SocketStream, identity: Identity, name: str = "shell") -> TlsStream:
    """Visit as `identity`, as far as that goes."""
    await far.send_all(encode_certificate(identity.certificate))
    message, _rest = await message_of(far)
    assert (message.kind, message.body) == (CERTIFICATE, ALICE.certificate)
    context = peer_context(identity, ALICE.certificate, server_side=False, protocol=protocol_of(name))
    connection = far.socket
    tls = TlsSocket(stdlib_socket(connection), context)
    await tls.shake_hands()
    return TlsStream(tls)


def stdlib_socket(connection: trio.socket.SocketType) -> socket.socket:

    taken = socket.socket(fileno=connection.detach())
    taken.setblocking(False)
    return taken


class Streams:
    """A visitor's streams: another implementation of a session, with nothing but the codec."""

    def __init__(self, tls: TlsStream) -> None:
        self.tls = tls
        self.mux = Mux(initiator=True)
        self.mux.set_default_credit(1 << 20)
        self.received: dict[int, bytes] = {}
        self.events: list[Event] = []

    async def flush(self) -> None:
        await self.tls.send_all(bytes(self.mux.outgoing))
        self.mux.outgoing.clear()

    async def open(self, protocol: int = STREAM_PROTOCOL) -> int:
        """A stream that was announced to the host."""
        stream = self.mux.open(protocol)
        await self.flush()
        return stream

    async def receive(self) -> None:
        """Take what the host sends next."""
        data = await self.tls.receive_some()
        assert data, "the host ended the session"
        self.take(data)
        await self.flush()

    def take(self, data: bytes | bytearray) -> None:
        for item in self.mux.receive(data):
            if isinstance(item, tuple):
                self.received[item[0]] = self.received.get(item[0], b"") + bytes(item[1])
            elif isinstance(item, Opened):  # a ping
                self.mux.reset(item.session)
            else:
                self.events.append(item)

    def has(self, stream: int, received: bytes) -> bool:
        return self.received.get(stream) == received

    async def run(self) -> None:
        """Answer the host until it ends the session."""
        while data := await self.tls.receive_some():
            self.take(data)
            await self.flush()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():
                await self.receive()


async def test_each_stream_of_the_admitted_one_is_a_visitor(host: Host) -> None:
    async with await handshake(host.take(), BOB) as tls:
        visitor = Streams(tls)
        streams = [await visitor.open() for _ in range(2)]
        while len(host.visitors) < 2:
            await trio.lowlevel.checkpoint()
        await visitor.until(lambda: visitor.mux.session(streams[1]).credit > 0)
        for stream, one in zip(streams, host.visitors, strict=True):
            async with one.stream() as server:
                visitor.mux.send(stream, b"hello %d" % stream)
                await visitor.flush()
                assert await server.receive_some() == b"hello %d" % stream
                await server.send_all(b"answer")
                await visitor.until(partial(visitor.has, stream, b"answer"))
    assert host.reporter.all("admitted") == [{"visitor": "unknown", "peer": "bob", "id": str(BOB.id)}]
    assert host.failures == []


def refusals(visitor: Streams) -> list[str]:
    return [event.text for event in visitor.events if isinstance(event, Reset | SessionRefused)]


async def test_streams_for_anything_else_are_refused(host: Host) -> None:
    async with await handshake(host.take(), BOB) as tls:
        visitor = Streams(tls)
        await visitor.open(22)
        await visitor.until(lambda: bool(refusals(visitor)))
        assert refusals(visitor) == ["no such protocol"]
    assert not host.visitors


async def test_a_peer_that_is_removed_gets_no_further_stream(host: Host) -> None:
    async with await handshake(host.take(), BOB) as tls:
        visitor = Streams(tls)
        first = await visitor.open()
        while not host.visitors:
            await trio.lowlevel.checkpoint()
        host.end._trusted.remove("bob")
        await visitor.open()
        await visitor.until(lambda: bool(refusals(visitor)))
        assert refusals(visitor) == [f"not admitted any more: bob ({BOB.id})"]
        assert host.failures == refusals(visitor)
        async with host.visitors[0].stream() as server:
            await server.send_all(b"goes on")
            await visitor.until(partial(visitor.has, first, b"goes on"))


@pytest.mark.parametrize("streams", [0, 1])
async def test_a_host_that_takes_no_more_visitors_ends_with_its_streams(host: Host, streams: int) -> None:
    async with await handshake(host.take(), BOB) as tls:
        visitor = Streams(tls)
        for _ in range(streams):
            await visitor.open()
        while len(host.visitors) < streams or not host.end._sessions:
            await trio.lowlevel.checkpoint()
        host.end.retire()
        await visitor.until(lambda: any(isinstance(each, EndpointDefined) for each in visitor.events))
        assert [each.uri for each in visitor.events if isinstance(each, EndpointDefined)] == [RETIRED]
        if streams:
            await visitor.open()
            await visitor.until(lambda: bool(refusals(visitor)))
            assert refusals(visitor) == ["the tunnel takes no more connections"]
            host.visitors[0].close("it has finished")
        await visitor.run()
    assert not host.end._sessions


async def test_a_peer_has_so_many_sessions(host: Host) -> None:
    sessions = [await handshake(host.take(), BOB) for _ in range(MAX_SESSIONS)]
    while len(host.end._sessions) < MAX_SESSIONS:
        await trio.lowlevel.checkpoint()
    async with host.take() as far:
        await far.send_all(encode_certificate(BOB.certificate))
        assert (await message_of(far))[0].text == f"too many sessions: {BOB.id} has {MAX_SESSIONS}"
    await sessions.pop().aclose()
    while len(host.end._sessions) == MAX_SESSIONS:
        await trio.lowlevel.checkpoint()
    sessions.append(await handshake(host.take(), BOB))
    for session in sessions:
        await session.aclose()


async def test_another_one_is_told(host: Host) -> None:
    async with host.take() as far:
        await far.send_all(encode_certificate(CAROL.certificate))
        message, rest = await message_of(far)
        assert (message.kind, message.text, rest) == (REFUSAL, f"not admitted: {CAROL.id}", b"")
        assert await far.receive_some() == b""
    assert host.failures == [f"not admitted: {CAROL.id}; to let it in, add --admit {CAROL.id}"]


async def test_what_is_known_of_a_peer_is_not_told_to_it(host: Host) -> None:
    """Alice may have a name for carol that is none of carol's business."""
    host.end._trusted.add("nuisance", CAROL.id)
    async with host.take() as far:
        await far.send_all(encode_certificate(CAROL.certificate))
        assert (await message_of(far))[0].text == f"not admitted: {CAROL.id}"
    assert host.failures == [f"not admitted: {CAROL.id}; to let it in, add --admit nuisance"]


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"TPV1\x02\x00\x01x",
        b"TPV1\x01\x00\x05hello",
        b"TPV1\x01\xff\xff",
        encode_certificate(b"")[:4] + b"\x09",
    ],
)
async def test_visitors_that_speak_something_else_are_refused(host: Host, sent: bytes) -> None:
    async with host.take() as far:
        await far.send_all(sent)
        assert (await message_of(far))[0].kind == REFUSAL
    assert len(host.failures) == 1
    assert not host.visitors


async def test_a_visitor_without_the_key_gets_an_alert(host: Host) -> None:
    """It knows bob's certificate, which is no secret."""
    thief = Identity(BOB.id, BOB.certificate, CAROL.pem)
    visitor = await handshake(host.take(), thief)  # in TLS 1.3 it is done before the host has checked it
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some()
    await visitor.aclose()
    assert "not admitted: bob" in host.failures[0]
    assert not host.visitors


async def test_the_name_of_the_tunnel_must_be_the_same(host: Host) -> None:
    far = host.take()
    visitor = await handshake(far, BOB, "admin")
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some()
    await visitor.aclose()
    assert host.failures == ["not admitted: bob asked for another tunnel than shell"]


@pytest.mark.parametrize("sent", [b"", b"TPV1\x01\x00\xff"])
async def test_a_silent_visitor_has_a_deadline(host: Host, autojump_clock: MockClock, sent: bytes) -> None:
    far, began = host.take(), trio.current_time()
    async with far:
        if sent:
            await far.send_all(sent)
        with pytest.raises(trio.BrokenResourceError):
            await far.receive_some()
    assert trio.current_time() - began == pytest.approx(PREAMBLE_TIMEOUT, abs=1.0)
    assert host.failures == [f"no certificate within {PREAMBLE_TIMEOUT:g} s"]


async def test_so_has_a_handshake(host: Host, autojump_clock: MockClock) -> None:
    async with host.take() as far:
        await far.send_all(encode_certificate(BOB.certificate))
        await message_of(far)
        with pytest.raises(trio.BrokenResourceError):
            await far.receive_some()
    assert host.failures == [f"not admitted: bob ({BOB.id}): TLS handshake failed: the TLS handshake takes too long"]


@pytest.mark.parametrize("begun", [False, True])
async def test_any_number_of_slow_visitors_keeps_nobody_out(host: Host, begun: bool) -> None:
    slow = [host.take() for _ in range(2 * MAX_PENDING)]
    if begun:  # as far as the handshake, with bob's certificate
        for far in slow[MAX_PENDING:]:
            await far.send_all(encode_certificate(BOB.certificate))
            await message_of(far)
    assert len(host.failures) == MAX_PENDING
    visitor = await handshake(host.take(), BOB)
    while not host.end._sessions:
        await trio.lowlevel.checkpoint()
    assert len(host.end._preambles) <= MAX_PENDING
    assert len(host.end._handshakes) <= MAX_PENDING
    await visitor.aclose()
    for far in slow:
        await far.aclose()


async def test_what_must_be_there_before_a_tunnel_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_home(tmp_path, monkeypatch)
    reporter = RecordingReporter()

    def make(engine: Pump | PortableEngine, *admit: str) -> None:
        PrivateVisitors(engine, PrivateSettings("shell", admit), reporter, _unused, _unused)

    with pytest.raises(UsageError, match="tunnel identity create"):
        make(Pump(EngineLimits()))
    ALICE.save(tmp_path / "config/tunneld/identity.pem")
    with pytest.raises(UsageError, match="tunnel trust add dave ID"):
        make(Pump(EngineLimits()), "bob", "dave")
    with pytest.raises(UsageError, match="epoll"):
        make(PortableEngine(EngineLimits()))
    make(Pump(EngineLimits()), "any", str(CAROL.id))


def _unused(*_: object) -> None:
    raise AssertionError


def test_a_context_is_made_once_for_each_peer() -> None:
    first = context_for(ALICE, BOB.certificate, "shell", server_side=True)
    assert context_for(ALICE, BOB.certificate, "shell", server_side=True) is first
    assert context_for(ALICE, CAROL.certificate, "shell", server_side=True) is not first
    assert context_for(ALICE, BOB.certificate, "shell", server_side=False) is not first
