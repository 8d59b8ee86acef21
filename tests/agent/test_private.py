"""The exposing end of a private tunnel, and visitors that mean no good."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.agent.support import RecordingReporter
from tests.engine.bench import open_descriptors, stream, tcp_pair
from tests.support.private import ALICE, BOB, CAROL, make_home
from tunneld.agent.config import PrivateSettings
from tunneld.agent.private import MAX_PENDING, PREAMBLE_TIMEOUT, PrivateVisitors, context_for, protocol_of
from tunneld.agent.source import SocketVisitor, VisitorConnection
from tunneld.engine.limits import EngineLimits
from tunneld.engine.portable import PortableEngine
from tunneld.engine.pump import Pump
from tunneld.errors import UsageError
from tunneld.tls.connection import TlsSocket
from tunneld.tls.identity import Identity, peer_context
from tunneld.tls.stream import TlsStream
from tunneld.wire.preamble import CERTIFICATE, REFUSAL, PreambleMessage, encode_certificate, parse_preamble

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


async def test_the_admitted_one_gets_in(host: Host) -> None:
    visitor = await handshake(host.take(), BOB)
    while not host.visitors:
        await trio.lowlevel.checkpoint()
    async with visitor, host.visitors[0].stream() as server:
        await visitor.send_all(b"hello")
        assert await server.receive_some() == b"hello"
        await server.send_all(b"answer")
        assert await visitor.receive_some() == b"answer"
    assert host.reporter.all("admitted") == [{"visitor": "unknown", "peer": "bob", "id": str(BOB.id)}]
    assert host.failures == []


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
    while not host.visitors:
        await trio.lowlevel.checkpoint()
    assert len(host.end._preambles) <= MAX_PENDING
    assert len(host.end._handshakes) <= MAX_PENDING
    await visitor.aclose()
    host.visitors[0].close("the test has ended")
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
