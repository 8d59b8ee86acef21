"""Malformed packets and requests that nobody needs: whatever a peer sends is its own fault, and is not kept."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest
import structlog
import trio
from asyncssh.packet import Boolean, Byte, String, UInt32

from tests.backends.ssh.client_loop import open_client
from tests.backends.ssh.support import Relay, make_key, relay
from tests.backends.ssh.test_hostile import LOCAL, VERSION, kexinit, logged_in, plain, record_packets, send
from tests.support.credentials import credential
from tests.support.peers import PATIENCE
from tunneld.backends.ssh.fast import CIPHER_BLOCK, FastConnection
from tunneld.backends.ssh.gcm import Gcm
from tunneld.backends.ssh.restricted import MAX_PENDING_REQUESTS, is_fault_of_peer
from tunneld.backends.ssh.session_channel import SESSION_REQUESTS, SessionChannel
from tunneld.engine.budget import CostShare, TurnBudget

KEXINIT = plain(kexinit(random.Random(1)))


@asynccontextmanager
async def logging_relay(**options: Any) -> AsyncIterator[tuple[Relay, list[Any]]]:
    """A relay, and what it logs. It must log no bug, and serve on."""
    with trio.fail_after(3 * PATIENCE), structlog.testing.capture_logs() as logged:
        async with relay(**options) as here:
            yield here, logged
            await here.until(lambda: len(here.preauth) == 0)
            stream = await trio.open_tcp_stream(LOCAL, here.port)
            async with stream:
                assert (await stream.receive_some(4)) == b"SSH-"
    assert [line for line in logged if line["log_level"] == "error"] == []


def packet(size: int, padding: int, payload: bytes) -> bytes:
    """A packet whose lengths may be wrong."""
    return UInt32(size) + Byte(padding) + payload


@pytest.mark.parametrize(
    "data",
    [
        packet(0, 0, bytes(100)),
        packet(1, 0, bytes(100)),
        packet(5, 4, bytes(100)),
        packet(11, 4, bytes(100)),
        packet(13, 4, bytes(100)),
        packet(12, 0, b"\x14" + bytes(100)),
        packet(12, 3, b"\x14" + bytes(100)),
        packet(12, 11, b"\x14" + bytes(100)),
        packet(12, 12, b"\x14" + bytes(100)),
        packet(12, 255, b"\x14" + bytes(100)),
        packet(20, 4, b"\x14" + bytes(100)),  # a KEXINIT without its lists
        KEXINIT + plain(b"\x1e"),
        KEXINIT + plain(b"\x15"),
        KEXINIT + plain(b"\x05" + String("ssh-userauth")),
        KEXINIT + plain(b"\x32" + String("me") + String("ssh-connection") + String("none")),
        KEXINIT + plain(b"\x5a"),
        plain(b"\x01" + UInt32(2) + String(b"\xff") + String(b"\xff")),
        plain(b"\x01"),
        plain(b"\x03"),
        plain(b"\x04" + Boolean(True) + String(b"\xff") + String("")),
    ],
)
async def test_a_malformed_packet_is_one_line_in_the_log(data: bytes) -> None:
    async with logging_relay() as (here, logged):
        await send(here, VERSION, data)
        await here.until(lambda: len(here.preauth) == 0)
        assert len([line for line in logged if line.get("peer")]) <= 1


async def test_a_packet_of_no_bytes_does_not_make_the_relay_spin() -> None:
    async with logging_relay() as (here, _logged):
        for seed in range(30):
            dice = random.Random(seed)
            size = dice.choice([0, 1, 2, 3, 4, 5, 7, 8, 9])
            await send(here, VERSION, packet(size, dice.randrange(256), dice.randbytes(dice.randrange(300))))


async def record_handshake(here: Relay) -> bytes:
    """What an asyncssh client sends until it has logged in."""
    recorded = bytearray()

    async def copy(source: trio.SocketStream, target: trio.SocketStream, record: bool) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for chunk in source:
                if record:
                    recorded.extend(chunk)
                await target.send_all(chunk)
            await target.send_eof()

    async def proxy(client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(LOCAL, here.port) as server, trio.open_nursery() as nursery:
            nursery.start_soon(copy, client, server, True)
            await copy(server, client, False)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, proxy, 0, host=LOCAL))
        port = listener.socket.getsockname()[1]
        async with open_client(LOCAL, port, username="me", known_hosts=None, client_keys=None, config=None):
            pass
        nursery.cancel_scope.cancel()
    return bytes(recorded)


def mutate(recorded: bytes, dice: random.Random) -> bytes:
    """Change a few bytes, or remove, repeat or insert some."""
    data = bytearray(recorded)
    for _ in range(dice.randrange(1, 6)):
        at, size = dice.randrange(len(data)), dice.randrange(1, 40)
        match dice.randrange(5):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at : at + 4] = UInt32(dice.choice([0, 1, 5, 12, 255, 65536, 1 << 31, 0xFFFFFFFF]))
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at:at] = dice.randbytes(size)
    return bytes(data)


async def test_no_mutation_of_a_handshake_is_a_bug_of_the_relay() -> None:
    async with logging_relay() as (here, logged):
        recorded = await record_handshake(here)
        assert recorded.startswith(b"SSH-2.0-AsyncSSH")
        logged.clear()
        for seed in range(250):
            await send(here, mutate(recorded, random.Random(seed)))
        by_peer: dict[str, int] = {}
        for line in logged:
            if peer := line.get("peer"):
                by_peer[peer] = by_peer.get(peer, 0) + 1
        assert max(by_peer.values(), default=0) <= 1


BODIES = (
    b"",
    b"\0",
    UInt32(0),
    UInt32(0xFFFFFFFF),
    String(b"\xff\xfe") * 3,
    String("me") + String("ssh-connection") + String("publickey") + b"\1" + String("ssh-rsa") + String(b"\xff" * 20),
    String("me") + String("ssh-connection") + String("publickey") + b"\0" + String("") + String(""),
    String("me") + String("ssh-connection") + String(b"\xff"),
    String("me") + String("ssh-connection") + String("hostbased") + String("") * 6,
    String("me") + String("ssh-connection") + String("keyboard-interactive") + String("") * 2,
    String("me") + String("ssh-connection") + String("gssapi-with-mic") + UInt32(0xFFFFFFFF),
    String("ssh-userauth"),
    UInt32(3) + String("a") * 3,
)


class HostileClient(asyncssh.SSHClient):
    """Sends one packet when the relay asks for a public key: the keys have been exchanged, nothing is authenticated."""

    def __init__(self, kind: int, body: bytes) -> None:
        self._packet = kind, body

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self._connection = conn

    def public_key_auth_requested(self) -> None:
        kind, body = self._packet
        self._connection._auth_complete = True  # or asyncssh would keep the packet until then
        self._connection.send_packet(kind, body)
        self._connection._auth_complete = False


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com", "aes128-ctr"])
async def test_no_packet_between_key_exchange_and_login_is_a_bug_of_the_relay(tmp_path: Path, cipher: str) -> None:
    _, line = make_key(tmp_path)
    kinds = [*range(1, 8), 20, 21, 30, 31, 32, 50, 51, 52, 60, 61, 66, 80, 90, 91, 93, 94, 98, 100, 192, 255]
    me = credential("me", authorized_keys=[line])
    async with logging_relay(credentials=[me], login_timeout=0.3) as (here, _logged):  # some clients wait for ever
        dice = random.Random(cipher)
        for kind in kinds:
            for body in dice.sample(BODIES, 4 if kind != 50 else len(BODIES)):
                options = {"encryption_algs": [cipher], "known_hosts": None, "client_keys": None, "config": None}
                factory = lambda kind=kind, body=body: HostileClient(kind, body)  # noqa: E731
                try:
                    async with open_client(LOCAL, here.port, username="x", client_factory=factory, **options):
                        pass
                except* (asyncssh.Error, OSError):
                    pass


def test_only_an_exception_of_our_own_code_is_a_bug() -> None:
    def caught(function: Any) -> BaseException:
        with pytest.raises(Exception) as error:  # noqa: PT011
            function()
        return error.value

    assert is_fault_of_peer(caught(lambda: asyncssh.packet.SSHPacket(b"").get_byte()))
    assert is_fault_of_peer(caught([].pop))  # not in the package
    assert is_fault_of_peer(UnicodeDecodeError("utf-8", b"", 0, 1, "wherever it is raised"))
    assert not is_fault_of_peer(caught(lambda: SessionChannel.like(object())))  # type: ignore[arg-type]


# The fast path


class Sealed:
    """The buffers of packets that a client with the right keys sends."""

    def __init__(self) -> None:
        self._cipher = Gcm(bytes(16), bytes(12))

    def packet(self, content: bytes) -> bytes:
        length = len(content).to_bytes(4, "big")
        return length + self._cipher.seal(length, content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not fill blocks"),
        (b"\x04\x02" + bytes(15), "does not fill blocks"),
        (b"\x00" + b"\x02" + bytes(14), "padding"),
        (b"\x03" + b"\x02" + bytes(14), "padding"),
        (b"\x0f" + b"\x02" + bytes(14), "padding"),
        (b"\xff" + b"\x02" + bytes(14), "padding"),
    ],
)
def test_lengths_are_checked_on_the_fast_path_too(content: bytes, reason: str) -> None:
    class Connection:
        _recv_encryption = Gcm(bytes(16), bytes(12))
        _max_packet = 1 << 16
        on_channel_data = None
        transport = SimpleNamespace(turns=SimpleNamespace(share=CostShare(TurnBudget(256))))

    assert CIPHER_BLOCK == 16
    with pytest.raises(asyncssh.ProtocolError, match=reason):
        FastConnection._receive_packets(Connection(), memoryview(Sealed().packet(content) + bytes(32)))  # type: ignore[arg-type]


# Requests that are not kept


async def open_session(here: Relay, connection: asyncssh.SSHClientConnection) -> tuple[list[tuple[int, bytes]], int]:
    """The packets that the relay sends from now on, and the number of a session's channel."""
    packets = record_packets(connection)
    connection.send_packet(90, String("session"), UInt32(7), UInt32(1 << 20), UInt32(1 << 15))
    await here.until(lambda: bool(packets))
    ((kind, body),) = packets
    packets.clear()
    assert kind == 91
    return packets, int.from_bytes(body[4:8], "big")


async def test_environment_variables_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    channels: list[SessionChannel] = []
    like = SessionChannel.like

    def record(channel: Any) -> SessionChannel:
        channels.append(like(channel))
        return channels[-1]

    monkeypatch.setattr(SessionChannel, "like", record)
    async with logging_relay() as (here, _logged), logged_in(here) as connection:
        packets, number = await open_session(here, connection)
        for index in range(500):
            reply = index % 100 == 0
            body = String("env") + Boolean(reply) + String(f"NAME{index}") + String(b"x" * 1000)
            connection.send_packet(98, UInt32(number), body)
        connection.send_packet(98, UInt32(number), String("window-change") + Boolean(True) + UInt32(1) * 4)
        await here.until(lambda: len(packets) == 6)
        assert [kind for kind, _ in packets] == [100] * 5 + [99]
        (kept,) = channels
        assert kept._env == {}
        assert not kept._request_queue


@pytest.mark.parametrize(
    "name", [b"subsystem", b"x11-req", b"auth-agent-req@openssh.com", b"xon-xoff", b"\xff", b"exit-status", b"x" * 9000]
)
async def test_other_requests_of_a_session_are_refused_and_cost_nothing(name: bytes) -> None:
    assert name not in SESSION_REQUESTS
    async with logging_relay() as (here, _logged), logged_in(here) as connection:
        packets, number = await open_session(here, connection)
        for reply in (False, True):
            connection.send_packet(98, UInt32(number), String(name) + Boolean(reply) + String("x") * 3)
        await here.until(lambda: bool(packets))
        assert [kind for kind, _ in packets] == [100]


async def test_a_command_of_many_kibibytes_is_refused_unread() -> None:
    async with logging_relay() as (here, _logged), logged_in(here) as connection:
        packets, number = await open_session(here, connection)
        connection.send_packet(98, UInt32(number), String("exec") + Boolean(True) + String(b"l" * 10_000))
        await here.until(lambda: bool(packets))
        assert [kind for kind, _ in packets] == [100]


async def test_global_requests_are_answered_in_order_and_unknown_ones_are_not_kept() -> None:
    async with logging_relay() as (here, _logged), logged_in(here) as connection:
        packets = record_packets(connection)
        forward = String("tcpip-forward") + Boolean(True) + String("") + UInt32(0)
        connection.send_packet(80, forward)  # the reply waits for the tunnel
        for _ in range(10 * MAX_PENDING_REQUESTS):
            connection.send_packet(80, String("no-more-sessions@openssh.com") + Boolean(False) + String(b"x" * 5000))
        connection.send_packet(80, String("what@example.org") + Boolean(True) + String(b"x" * 5000))
        connection.send_packet(80, String("tcpip-forward") + Boolean(True) + String(b"x" * 5000) + UInt32(0))
        connection.send_packet(80, String("keepalive@openssh.com") + Boolean(True))
        await here.until(lambda: len([kind for kind, _ in packets if kind in {81, 82}]) == 4)
        assert [kind for kind, _ in packets if kind in {81, 82}] == [81, 82, 82, 81]
