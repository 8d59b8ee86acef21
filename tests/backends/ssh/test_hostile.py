"""Malformed and hostile input before and after the login: it costs its own connection, and no bug is logged."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, cast

import asyncssh
import pytest
import structlog
import trio
import trio.lowlevel
from asyncssh.packet import Boolean, Byte, NameList, SSHPacket, String, UInt32

from tests.agent.support import echo, local_server
from tests.agent.test_expose import ask
from tests.backends.ssh.client_loop import open_client, wait
from tests.backends.ssh.support import Relay, client, openssh, relay
from tests.support.peers import PATIENCE, is_dropped
from tunneld.auth.authenticator import PREAUTH_LOG_RATE
from tunneld.auth.penalties import FREE_FAILURES
from tunneld.auth.preauth import PreauthReason
from tunneld.backends.ssh.channel import MIN_PACKET_DATA
from tunneld.backends.ssh.connection import MAX_REFUSALS
from tunneld.backends.ssh.console import MAX_SCHEME_CHARACTERS, MAX_SESSIONS
from tunneld.backends.ssh.fast import MAX_PACKET_DATA, MAX_PACKETS_PER_TURN, PACKET_COST, FastConnection
from tunneld.backends.ssh.gcm import GCM_CIPHERS
from tunneld.backends.ssh.negotiation import STRICT_KEX, choose_ciphers
from tunneld.backends.ssh.port import KEY_EXCHANGES
from tunneld.backends.ssh.terminal import MAX_UNREAD, Terminal
from tunneld.backends.ssh.transport import MAX_PREAUTH_BYTES
from tunneld.config.credentials import Credential
from tunneld.engine.limits import EngineLimits

LOCAL = "127.0.0.1"
VERSION = b"SSH-2.0-hostile\r\n"
SEEDS = range(60)


@asynccontextmanager
async def undisturbed_relay(credentials: Sequence[Credential] = (), **keys: Any) -> AsyncIterator[Relay]:
    """A relay that must serve another tunnel before and after, release all preauth slots, and log no bug."""
    with trio.fail_after(2 * PATIENCE), structlog.testing.capture_logs() as logged:
        async with relay(credentials, **keys) as here, local_server(echo) as target:
            tunnel = await here.open()
            other_client = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, user=tunnel.server_uri.key)
            async with client(other_client):
                await here.until_served()
                assert await ask(tunnel.client_uri, b"before") == b"before"
                yield here
                await here.until(lambda: len(here.preauth) == 0)
                assert await ask(tunnel.client_uri, b"after") == b"after"
    assert [line for line in logged if line["log_level"] == "error"] == []


async def send(here: Relay, *parts: bytes) -> None:
    """Connect, send all parts and an end of file, and wait until the relay has closed the connection."""
    stream = await trio.open_tcp_stream(LOCAL, here.port)
    async with stream:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            for part in parts:
                await stream.send_all(part)
            await stream.send_eof()
            async for _ in stream:
                pass


def plain(payload: bytes, padding: int = 0) -> bytes:
    """An unencrypted packet (RFC 4253, section 6)."""
    padding = padding or 4 + (3 - len(payload) - 4) % 8
    return UInt32(1 + len(payload) + padding) + Byte(padding) + payload + bytes(padding)


def kexinit(dice: random.Random, exchanges: Sequence[bytes] = (b"curve25519-sha256", STRICT_KEX)) -> bytes:
    lists = [exchanges, [b"ssh-ed25519"], *[list(GCM_CIPHERS)] * 2, *[[b"hmac-sha2-256"]] * 2, *[[b"none"]] * 2, [], []]
    return b"\x14" + dice.randbytes(16) + b"".join(map(NameList, lists)) + Boolean(False) + UInt32(0)


async def test_random_bytes_from_the_start() -> None:
    async with undisturbed_relay() as here:
        for seed in SEEDS:
            await send(here, random.Random(seed).randbytes(random.Random(seed).randrange(1, 5000)))


async def test_random_bytes_after_the_version() -> None:
    async with undisturbed_relay() as here:
        for seed in SEEDS:
            dice = random.Random(seed)
            await send(here, VERSION, dice.randbytes(dice.randrange(1, 3000)))


async def test_well_formed_packets_of_any_type_before_the_key_exchange() -> None:
    async with undisturbed_relay() as here:
        for seed in SEEDS:
            dice = random.Random(seed)
            opening = [VERSION] + ([plain(kexinit(dice))] if dice.random() < 0.7 else [])
            packets = [
                plain(bytes([dice.randrange(256)]) + dice.randbytes(dice.randrange(80)))
                for _ in range(dice.randrange(1, 6))
            ]
            await send(here, *opening, *packets)


async def test_an_opening_that_is_truncated_or_damaged_at_any_byte() -> None:
    opening = VERSION + plain(kexinit(random.Random(0))) + plain(b"\x1e" + String(bytes(range(32))))
    async with undisturbed_relay() as here:
        for at in [*range(0, len(VERSION) + 60, 7), *range(60, len(opening), 31)]:
            await send(here, opening[:at])
            damaged = bytearray(opening)
            damaged[at] ^= 0x55
            await send(here, bytes(damaged))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n",
        b"SSH-1.5-old\r\n",
        b"x" * 100_000,
        VERSION + b"\xff\xff\xff\xff" + b"x" * 100_000,
        VERSION + UInt32(12) + b"\xff" * 12,
        VERSION + plain(b""),
        VERSION + plain(kexinit(random.Random(1), [b"diffie-hellman-group1-sha1"])),
        VERSION + plain(b"\x02" + String(b"")) + plain(kexinit(random.Random(1))),  # strict: KEXINIT is not the first
        VERSION + plain(kexinit(random.Random(1))) * 5,
        VERSION + plain(kexinit(random.Random(1))) + plain(b"\x1e" + String(bytes(32))),  # a point of order 1
    ],
)
async def test_an_invalid_opening_is_closed(data: bytes) -> None:
    async with undisturbed_relay() as here:
        await send(here, data)


async def test_an_incomplete_login_is_closed_after_the_login_timeout() -> None:
    async with undisturbed_relay(login_timeout=0.3) as here:
        for data in (b"", VERSION, VERSION + plain(kexinit(random.Random(1)))):
            stream = await trio.open_tcp_stream(LOCAL, here.port)
            await stream.send_all(data)
            async for _ in stream:
                pass
            await stream.aclose()


async def test_unauthenticated_connections_are_limited_and_penalised_as_on_the_control_port() -> None:
    with trio.fail_after(PATIENCE):
        async with relay(exempt=False) as here:
            here.control = here.control.model_copy(update={"max_startups_per_source": 2})
            two = [await trio.open_tcp_stream(LOCAL, here.port) for _ in range(2)]
            await here.until(lambda: len(here.preauth) == 2)
            third = await trio.open_tcp_stream(LOCAL, here.port)
            assert await is_dropped(third)
            assert here.preauth.refusals[PreauthReason.PER_SOURCE] == 1
            for stream in (*two, third):
                await stream.aclose()
            await here.until(lambda: len(here.preauth) == 0)
            for _ in range(3):
                await send(here, b"GET / HTTP/1.1\r\n\r\n")
            assert here.preauth.penalty(LOCAL, trio.current_time()) > 0


async def test_connections_beyond_max_connections_are_refused() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(max_connections=2) as here,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:9", LOCAL)) as first,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:9", LOCAL)) as second,
        ):
            await first.port()
            await second.port()
            async with client(openssh(here, LOCAL, "list")) as third:
                assert await third.ended() == 255


# Algorithms


def test_one_family_of_ciphers_is_offered_and_strict_ciphers_only_with_strict_key_exchange() -> None:
    chacha, counter, aead = b"chacha20-poly1305@openssh.com", b"aes128-ctr", b"aes256-gcm@openssh.com"
    assert choose_ciphers([chacha, counter, aead], strict=True) == GCM_CIPHERS
    assert choose_ciphers([chacha, counter], strict=True) == (chacha,)
    assert counter in choose_ciphers([chacha, counter], strict=False)
    assert chacha not in choose_ciphers([chacha], strict=False)
    assert not any(b"cbc" in name or b"arcfour" in name for name in choose_ciphers([], strict=True))


@pytest.mark.parametrize(
    ("option", "works"),
    [
        ("Ciphers=aes256-gcm@openssh.com", True),
        ("Ciphers=chacha20-poly1305@openssh.com", True),
        ("Ciphers=aes256-ctr", True),
        ("Ciphers=aes128-cbc", False),
        ("KexAlgorithms=diffie-hellman-group14-sha1", False),
        ("KexAlgorithms=diffie-hellman-group-exchange-sha256", False),
        ("KexAlgorithms=ecdh-sha2-nistp256", True),
        ("HostKeyAlgorithms=ssh-rsa", False),
    ],
)
async def test_only_modern_algorithms_work(option: str, works: bool) -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            forward = ["-o", option, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL]
            async with client(openssh(here, *forward)) as ssh:
                if works:
                    await here.until_served()
                    assert await ask(here.tunnel.client_uri, b"x" * 200_000) == b"x" * 200_000
                else:
                    assert await ssh.ended() == 255
                    await ssh.wait_output("no matching")


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"])
@pytest.mark.parametrize("initiator", ["client", "relay", "both"])
async def test_keys_are_exchanged_again_during_a_transfer(initiator: str, cipher: str) -> None:
    data = random.Random(3).randbytes(8 << 20)
    rekey_bytes = 1 << 35 if initiator == "client" else 1 << 20
    with trio.fail_after(2 * PATIENCE):
        async with relay(rekey_octets=rekey_bytes) as here, local_server(echo) as target:
            limit = ["-oRekeyLimit=1M"] if initiator != "relay" else []
            forward = ["-v", *limit, "-oCiphers=" + cipher, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL]
            async with client(openssh(here, *forward)) as ssh:
                await here.until_served()
                assert await ask(here.tunnel.client_uri, data) == data
                assert ssh.err.count("SSH2_MSG_NEWKEYS received") > 4


# Hostile clients after the login


def logged_in(here: Relay, **options: Any) -> AbstractAsyncContextManager[asyncssh.SSHClientConnection]:
    """An asyncssh client that has logged in, for the length of a block."""
    return open_client(LOCAL, here.port, username="me", known_hosts=None, client_keys=None, config=None, **options)


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"])
async def test_packets_of_any_type_after_the_login_cost_their_own_connection(cipher: str) -> None:
    async with undisturbed_relay() as here:
        for seed in range(40):
            dice = random.Random(seed)
            async with logged_in(here, encryption_algs=[cipher]) as connection:
                for _ in range(dice.randrange(1, 5)):
                    kind = dice.choice([*range(1, 8), 20, 21, 30, 31, 50, 60, 61, *range(80, 83), *range(90, 101), 192])
                    body = dice.choice(
                        [b"", dice.randbytes(30), UInt32(dice.randrange(3)) * 3, String("tcpip-forward") + b"\1" * 20]
                    )
                    connection.send_packet(kind, body)
                await trio.lowlevel.checkpoint()


async def test_a_connection_has_no_more_forwards_than_max_forwards() -> None:
    with trio.fail_after(PATIENCE):
        async with relay(max_forwards=2) as here:
            forwards = [word for port in (7, 8, 9) for word in ("-R", f"0:{LOCAL}:{port}")]
            async with client(openssh(here, "-v", "-N", *forwards, LOCAL)) as ssh:
                await ssh.wait_output(r"limit of -R reached: 2 are open \(ssh.max_forwards\)")
                assert len(list(here.service.tunnels())) == 2


async def test_visitors_beyond_max_channels_wait_for_another_one_to_leave() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(max_channels=2) as here,
            local_server(echo) as target,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)),
        ):
            (tunnel,) = await here.until_served()
            visitors = [await trio.open_tcp_stream(LOCAL, tunnel.client_uri.port) for _ in range(3)]
            await here.until(lambda: tunnel.waiting == 1 and len(tunnel.visitors) == 2)
            await visitors[0].aclose()
            await here.until(lambda: tunnel.waiting == 0)
            await visitors[2].send_all(b"hello")
            assert await visitors[2].receive_some(5) == b"hello"
            for visitor in visitors[1:]:
                await visitor.aclose()


async def test_a_flood_of_requests_is_disconnected() -> None:
    async with undisturbed_relay() as here, logged_in(here) as connection:
        for _ in range(1000):
            connection.send_packet(80, String("tcpip-forward"), Boolean(True), String(""), UInt32(0))
        await here.until(lambda: len(list(here.service.tunnels())) <= 33)
        with trio.move_on_after(5):
            await wait(connection, connection.wait_closed())
        assert connection.is_closed()


async def test_a_forged_packet_ends_the_connection() -> None:
    async with undisturbed_relay() as here, logged_in(here) as connection:
        transport = connection._transport
        assert transport is not None
        transport.write(b"\0\0\0\x20" + b"x" * 48)
        with trio.move_on_after(5):
            await wait(connection, connection.wait_closed())
        assert connection.is_closed()


def test_the_largest_packet_is_one_that_every_implementation_sends() -> None:
    assert MAX_PACKET_DATA >= 32768  # RFC 4253, section 6.1
    assert len(KEY_EXCHANGES) == len(set(KEY_EXCHANGES))


async def test_sessions_beyond_max_sessions_are_refused() -> None:
    async with undisturbed_relay() as here, logged_in(here) as connection:

        async def open_one() -> None:
            await wait(connection, connection.create_session(asyncssh.SSHClientSession))

        await wait(connection, connection.forward_remote_port("", 0, LOCAL, 9))  # without a -R, sessions end at once
        for _ in range(MAX_SESSIONS):
            await open_one()
        with pytest.raises(asyncssh.ChannelOpenError, match="sessions are open"):
            await open_one()


async def test_a_client_with_too_many_refused_forwards_is_disconnected() -> None:
    async with undisturbed_relay() as here, logged_in(here) as connection:
        for number in range(MAX_REFUSALS):
            connection.send_packet(80, String("tcpip-forward"), Boolean(True), String(f"name{number}"), UInt32(80))
            await trio.lowlevel.checkpoint()
        with trio.move_on_after(10):
            await wait(connection, connection.wait_closed())
        assert connection.is_closed()


async def test_keys_are_exchanged_again_after_the_rekey_interval() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(rekey_interval=0.2) as here,
            local_server(echo) as target,
            client(openssh(here, "-v", "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)) as ssh,
        ):
            await here.until_served()
            while ssh.err.count("SSH2_MSG_NEWKEYS received") < 3:
                assert await ask(here.tunnel.client_uri, b"hello") == b"hello"


# Small requests with large effects


class PacketRecorder:
    """Records the packets of the relay from now on, in the place of asyncssh's client and all of its channels."""

    def __init__(self, connection: asyncssh.SSHClientConnection) -> None:
        self.packets: list[tuple[int, bytes]] = []  # types and bodies
        patched: Any = connection
        patched.process_packet = self.process_packet
        patched._channels = defaultdict(lambda: self, connection._channels)

    def process_packet(self, kind: int, _number: int, packet: SSHPacket) -> bool:
        self.packets.append((kind, packet.get_remaining_payload()))
        return True

    def log_received_packet(self, *_packet: object) -> None:
        pass

    def process_connection_close(self, _error: object) -> None:
        pass


def record_packets(connection: asyncssh.SSHClientConnection) -> list[tuple[int, bytes]]:
    return PacketRecorder(connection).packets


@pytest.mark.parametrize("kind", [b"\x02" + String(b""), b"\x04\0" + String(b"") * 2, b"\x03" + UInt32(0)])
async def test_a_client_that_sends_much_without_logging_in_is_closed_and_penalised(kind: bytes) -> None:
    with trio.fail_after(PATIENCE):
        async with relay(exempt=False) as here:
            for _ in range(FREE_FAILURES + 1):
                await send(here, VERSION, plain(kind) * (MAX_PREAUTH_BYTES // 16 + 100))
            await here.until(lambda: len(here.preauth) == 0)
            assert here.preauth.penalty(LOCAL, trio.current_time()) > 0


async def test_abandoned_key_exchanges_are_penalised_and_probes_are_not() -> None:
    """Each costs the relay 4 ms; once, a client could abandon as many as it liked."""
    opening = VERSION + plain(kexinit(random.Random(0))) + plain(b"\x1e" + String(bytes(range(32))))
    with trio.fail_after(PATIENCE), structlog.testing.capture_logs() as logs:
        async with relay(exempt=False) as here:
            here.control = here.control.model_copy(update={"abandoned_handshakes": "5/h"})
            for data in [b""] * 20 + [opening] * (5 + FREE_FAILURES):
                await send(here, data)
            await here.until(lambda: len(here.preauth) == 0)
            assert here.preauth.penalty(LOCAL, trio.current_time()) == 0
            await send(here, opening)
            await here.until(lambda: here.preauth.penalty(LOCAL, trio.current_time()) > 0)
    assert [log for log in logs if log["event"] == "authentication failed"] == []


async def test_clients_that_do_not_log_in_do_not_flood_the_log() -> None:
    with trio.fail_after(PATIENCE), structlog.testing.capture_logs() as logs:
        async with relay() as here:
            for _ in range(30):
                await send(here, VERSION)
                await send(here, b"GET / HTTP/1.1\r\n\r\n")
            await here.until(lambda: len(here.preauth) == 0)
    assert len([log for log in logs if log["event"] == "hidden server refused"]) == PREAUTH_LOG_RATE.count


async def test_sessions_that_are_requested_at_once_are_limited_too() -> None:
    async with undisturbed_relay() as here, logged_in(here) as connection:
        packets = record_packets(connection)
        for number in range(50):
            connection.send_packet(90, String("session"), UInt32(number), UInt32(1 << 20), UInt32(1 << 15))
        await here.until(lambda: sum(kind in {91, 92} for kind, _ in packets) == 50)
        assert [kind for kind, _ in packets].count(91) == MAX_SESSIONS


@pytest.mark.parametrize(("max_data", "is_enough"), [(0, False), (MIN_PACKET_DATA - 1, False), (MIN_PACKET_DATA, True)])
async def test_a_tiny_maximum_packet_size_is_refused(max_data: int, is_enough: bool) -> None:
    async with undisturbed_relay() as here, logged_in(here) as connection:
        packets = record_packets(connection)
        connection.send_packet(80, String("tcpip-forward"), Boolean(True), String(""), UInt32(0))
        await here.until(lambda: any(kind == 81 for kind, _ in packets))
        tunnel = list(here.service.tunnels())[-1]
        visitor = await trio.open_tcp_stream(LOCAL, tunnel.client_uri.port)
        await here.until(lambda: any(kind == 90 for kind, _ in packets))
        body = SSHPacket(next(body for kind, body in packets if kind == 90))
        body.get_string()
        connection.send_packet(91, UInt32(body.get_uint32()), UInt32(7), UInt32(1 << 20), UInt32(max_data))
        with suppress(trio.BrokenResourceError):
            await visitor.send_all(b"x" * (2 * MIN_PACKET_DATA))
        await here.until(
            lambda: (
                connection.is_closed()
                or sum(len(body) - 4 for kind, body in packets if kind == 94) == 2 * MIN_PACKET_DATA
            )
        )
        assert connection.is_closed() is not is_enough
        assert all(len(body) - 4 <= max_data for kind, body in packets if kind == 94)
        await trio.aclose_forcefully(visitor)


async def test_replies_do_not_pile_up_during_an_endless_key_exchange() -> None:
    async with undisturbed_relay() as here, logged_in(here) as connection:
        record_packets(connection)
        connection._send_kexinit()
        connection._kex_complete = True  # so that this client sends on
        with suppress(OSError):
            while not connection.is_closed():
                for number in range(100):
                    connection.send_packet(90, String("what"), UInt32(number), UInt32(1), UInt32(1 << 15))
                await trio.sleep(0.001)
        assert connection.is_closed()


async def test_output_that_is_not_read_is_bounded() -> None:
    """A session without credit buffers its output, up to a limit."""
    channel = UnreadChannel()
    terminal = Terminal(cast("Any", channel), is_terminal=False)
    for _ in range(100):
        terminal.print("x" * 2000)
    assert MAX_UNREAD < channel.unread <= MAX_UNREAD + 2000
    channel.unread = 0
    terminal.print("read again")
    assert channel.unread == len("read again")


class UnreadChannel:
    """A session's channel whose peer reads nothing."""

    unread = 0

    def get_write_buffer_size(self) -> int:
        return self.unread

    def write(self, text: str) -> None:
        self.unread += len(text)


@pytest.mark.parametrize(("length", "is_shown"), [(MAX_SCHEME_CHARACTERS, True), (MAX_SCHEME_CHARACTERS + 1, False)])
async def test_the_scheme_in_a_qr_code_has_a_maximum_length(length: int, is_shown: bool) -> None:
    scheme = "s" * length
    with trio.fail_after(PATIENCE):
        async with relay() as here, client(openssh(here, "-R", f"0:{LOCAL}:9", LOCAL, f"qr {scheme}")) as ssh:
            if is_shown:
                await ssh.wait_output(f"{scheme}://", "out")
            else:
                assert await ssh.ended() != 0
                assert "unknown command" in ssh.err


async def test_a_burst_of_small_packets_is_handled_completely_and_in_several_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with undisturbed_relay() as here, logged_in(here, encryption_algs=["aes128-gcm@openssh.com"]) as connection:
        packets = record_packets(connection)
        turns, feed, dispatch = [0], FastConnection.feed, FastConnection._dispatch

        def counting_feed(self: FastConnection, data: memoryview) -> None:
            turns.append(0)
            feed(self, data)

        def counting_dispatch(self: FastConnection, payload: bytes) -> None:
            turns[-1] += 1
            dispatch(self, payload)

        monkeypatch.setattr(FastConnection, "feed", counting_feed)
        monkeypatch.setattr(FastConnection, "_dispatch", counting_dispatch)
        for number in range(20 * MAX_PACKETS_PER_TURN):
            connection.send_packet(90, String("none"), UInt32(number), UInt32(1), UInt32(1 << 15))
        await here.until(lambda: sum(kind == 92 for kind, _ in packets) == 20 * MAX_PACKETS_PER_TURN)
        assert [int.from_bytes(body[:4], "big") for kind, body in packets if kind == 92] == list(
            range(20 * MAX_PACKETS_PER_TURN)
        )
        assert max(turns) <= EngineLimits().turn_cost // PACKET_COST
