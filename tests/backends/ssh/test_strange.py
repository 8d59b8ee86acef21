"""Strange openings and strange guests: each costs its own connection, and the log has no bug in it."""

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
from tests.support.people import PATIENCE, is_dropped
from tunneld.auth.preauth import FREE_FAILURES, PreauthReason
from tunneld.backends.ssh.channel import LEAST_PACKET
from tunneld.backends.ssh.connection import MAX_REFUSALS
from tunneld.backends.ssh.console import LONGEST_SCHEME, MAX_SESSIONS
from tunneld.backends.ssh.fast import MAX_PACKET, MAX_PACKETS_PER_TURN, FastConnection
from tunneld.backends.ssh.gcm import NAMES
from tunneld.backends.ssh.negotiation import EXCHANGES, STRICT, choose
from tunneld.backends.ssh.terminal import MAX_UNREAD, Terminal
from tunneld.backends.ssh.transport import PREAUTH_LIMIT
from tunneld.config.credentials import Credential

LOCAL = "127.0.0.1"
VERSION = b"SSH-2.0-strange\r\n"
SEEDS = range(60)


@asynccontextmanager
async def unharmed(credentials: Sequence[Credential] = (), **keys: Any) -> AsyncIterator[Relay]:
    """A relay that serves a bystander before and after, keeps nobody, and logs no bug."""
    with trio.fail_after(2 * PATIENCE), structlog.testing.capture_logs() as logged:
        async with relay(credentials, **keys) as here, local_server(echo) as target:
            tunnel = await here.open()
            bystander = openssh(here, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL, user=tunnel.server_uri.key)
            async with client(bystander):
                await here.until_served()
                assert await ask(tunnel.client_uri, b"before") == b"before"
                yield here
                await here.until(lambda: len(here.strangers) == 0)
                assert await ask(tunnel.client_uri, b"after") == b"after"
    assert [line for line in logged if line["log_level"] == "error"] == []


async def say(here: Relay, *said: bytes) -> None:
    """Connect, say it, end, and wait until the relay has closed it, too."""
    stream = await trio.open_tcp_stream(LOCAL, here.port)
    async with stream:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            for part in said:
                await stream.send_all(part)
            await stream.send_eof()
            async for _ in stream:
                pass


def plain(payload: bytes, padding: int = 0) -> bytes:
    """A packet before there are keys (RFC 4253, section 6)."""
    padding = padding or 4 + (3 - len(payload) - 4) % 8
    return UInt32(1 + len(payload) + padding) + Byte(padding) + payload + bytes(padding)


def kexinit(dice: random.Random, exchanges: Sequence[bytes] = (b"curve25519-sha256", STRICT)) -> bytes:
    lists = [exchanges, [b"ssh-ed25519"], *[list(NAMES)] * 2, *[[b"hmac-sha2-256"]] * 2, *[[b"none"]] * 2, [], []]
    return b"\x14" + dice.randbytes(16) + b"".join(map(NameList, lists)) + Boolean(False) + UInt32(0)


async def test_nonsense_from_the_first_octet() -> None:
    async with unharmed() as here:
        for seed in SEEDS:
            await say(here, random.Random(seed).randbytes(random.Random(seed).randrange(1, 5000)))


async def test_nonsense_behind_a_version() -> None:
    async with unharmed() as here:
        for seed in SEEDS:
            dice = random.Random(seed)
            await say(here, VERSION, dice.randbytes(dice.randrange(1, 3000)))


async def test_well_formed_packets_of_any_kind_before_there_are_keys() -> None:
    async with unharmed() as here:
        for seed in SEEDS:
            dice = random.Random(seed)
            opening = [VERSION] + ([plain(kexinit(dice))] if dice.random() < 0.7 else [])
            strange = [
                plain(bytes([dice.randrange(256)]) + dice.randbytes(dice.randrange(80)))
                for _ in range(dice.randrange(1, 6))
            ]
            await say(here, *opening, *strange)


async def test_an_opening_that_is_broken_off_or_damaged_at_any_octet() -> None:
    opening = VERSION + plain(kexinit(random.Random(0))) + plain(b"\x1e" + String(bytes(range(32))))
    async with unharmed() as here:
        for at in [*range(0, len(VERSION) + 60, 7), *range(60, len(opening), 31)]:
            await say(here, opening[:at])
            damaged = bytearray(opening)
            damaged[at] ^= 0x55
            await say(here, bytes(damaged))


@pytest.mark.parametrize(
    "said",
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
async def test_an_opening_that_cannot_be_is_closed(said: bytes) -> None:
    async with unharmed() as here:
        await say(here, said)


async def test_who_says_nothing_is_closed_after_the_login_timeout() -> None:
    async with unharmed(login_timeout=0.3) as here:
        for said in (b"", VERSION, VERSION + plain(kexinit(random.Random(1)))):
            stream = await trio.open_tcp_stream(LOCAL, here.port)
            await stream.send_all(said)
            async for _ in stream:
                pass
            await stream.aclose()


async def test_strangers_are_capped_and_penalised_as_on_the_control_port() -> None:
    with trio.fail_after(PATIENCE):
        async with relay(exempt=False) as here:
            here.control = here.control.model_copy(update={"max_startups_per_source": 2})
            two = [await trio.open_tcp_stream(LOCAL, here.port) for _ in range(2)]
            await here.until(lambda: len(here.strangers) == 2)
            third = await trio.open_tcp_stream(LOCAL, here.port)
            assert await is_dropped(third)
            assert here.strangers.refusals[PreauthReason.PER_SOURCE] == 1
            for stream in (*two, third):
                await stream.aclose()
            await here.until(lambda: len(here.strangers) == 0)
            for _ in range(3):
                await say(here, b"GET / HTTP/1.1\r\n\r\n")
            assert here.strangers.penalty(LOCAL, trio.current_time()) > 0


async def test_there_are_no_more_connections_than_are_allowed() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(max_connections=2) as here,
            client(openssh(here, "-N", "-R", f"0:{LOCAL}:9", LOCAL)) as first,
        ):
            await first.port()
            second = await trio.open_tcp_stream(LOCAL, here.port)
            await second.receive_some()  # our version
            async with client(openssh(here, LOCAL, "list")) as third:
                assert await third.ended() == 255
            await second.aclose()


# Which algorithms


def test_the_offer_is_one_kind_and_what_needs_strict_key_exchange_is_not_offered_without_it() -> None:
    chacha, counter, aead = b"chacha20-poly1305@openssh.com", b"aes128-ctr", b"aes256-gcm@openssh.com"
    assert choose([chacha, counter, aead], strict=True) == NAMES
    assert choose([chacha, counter], strict=True) == (chacha,)
    assert counter in choose([chacha, counter], strict=False)
    assert chacha not in choose([chacha], strict=False)
    assert not any(b"cbc" in name or b"arcfour" in name for name in choose([], strict=True))


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
async def test_modern_algorithms_only(option: str, works: bool) -> None:
    with trio.fail_after(PATIENCE):
        async with relay() as here, local_server(echo) as target:
            forward = ["-o", option, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL]
            async with client(openssh(here, *forward)) as ssh:
                if works:
                    await here.until_served()
                    assert await ask(here.tunnel.client_uri, b"x" * 200_000) == b"x" * 200_000
                else:
                    assert await ssh.ended() == 255
                    await ssh.wait_said("no matching")


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"])
@pytest.mark.parametrize("who", ["client", "relay", "both"])
async def test_keys_are_exchanged_anew_while_octets_cross(who: str, cipher: str) -> None:
    data = random.Random(3).randbytes(8 << 20)
    octets = 1 << 35 if who == "client" else 1 << 20
    with trio.fail_after(2 * PATIENCE):
        async with relay(rekey_octets=octets) as here, local_server(echo) as target:
            limit = ["-oRekeyLimit=1M"] if who != "relay" else []
            forward = ["-v", *limit, "-oCiphers=" + cipher, "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL]
            async with client(openssh(here, *forward)) as ssh:
                await here.until_served()
                assert await ask(here.tunnel.client_uri, data) == data
                assert ssh.err.count("SSH2_MSG_NEWKEYS received") > 4


# Somebody who is known, and strange


def guest(here: Relay, **options: Any) -> AbstractAsyncContextManager[asyncssh.SSHClientConnection]:
    """An asyncssh client that has logged in."""
    return open_client(LOCAL, here.port, username="me", known_hosts=None, client_keys=None, config=None, **options)


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"])
async def test_packets_of_any_kind_from_a_guest_cost_the_guest_alone(cipher: str) -> None:
    async with unharmed() as here:
        for seed in range(40):
            dice = random.Random(seed)
            async with guest(here, encryption_algs=[cipher]) as connection:
                for _ in range(dice.randrange(1, 5)):
                    kind = dice.choice([*range(1, 8), 20, 21, 30, 31, 50, 60, 61, *range(80, 83), *range(90, 101), 192])
                    body = dice.choice(
                        [b"", dice.randbytes(30), UInt32(dice.randrange(3)) * 3, String("tcpip-forward") + b"\1" * 20]
                    )
                    connection.send_packet(kind, body)
                await trio.lowlevel.checkpoint()


async def test_a_guest_cannot_have_more_forwards_than_are_allowed() -> None:
    with trio.fail_after(PATIENCE):
        async with relay(max_forwards=2) as here:
            forwards = [word for port in (7, 8, 9) for word in ("-R", f"0:{LOCAL}:{port}")]
            async with client(openssh(here, "-v", "-N", *forwards, LOCAL)) as ssh:
                await ssh.wait_said(r"2 are forwarded already \(ssh.max_forwards\)")
                assert len(list(here.service.tunnels())) == 2


async def test_visitors_beyond_the_channels_of_a_connection_wait_for_one_to_leave() -> None:
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


async def test_a_flood_of_requests_is_ended() -> None:
    async with unharmed() as here, guest(here) as connection:
        for _ in range(1000):
            connection.send_packet(80, String("tcpip-forward"), Boolean(True), String(""), UInt32(0))
        await here.until(lambda: len(list(here.service.tunnels())) <= 33)
        with trio.move_on_after(5):
            await wait(connection, connection.wait_closed())
        assert connection.is_closed()


async def test_a_packet_that_was_meddled_with_ends_the_connection() -> None:
    async with unharmed() as here, guest(here) as connection:
        transport = connection._transport
        assert transport is not None
        transport.write(b"\0\0\0\x20" + b"x" * 48)
        with trio.move_on_after(5):
            await wait(connection, connection.wait_closed())
        assert connection.is_closed()


def test_our_largest_packet_is_within_what_everybody_must_take() -> None:
    assert MAX_PACKET >= 32768  # RFC 4253, section 6.1
    assert len(EXCHANGES) == len(set(EXCHANGES))


async def test_there_are_no_more_sessions_than_a_person_needs() -> None:
    async with unharmed() as here, guest(here) as connection:

        async def open_one() -> None:
            await wait(connection, connection.create_session(asyncssh.SSHClientSession))

        for _ in range(MAX_SESSIONS):
            await open_one()
        with pytest.raises(asyncssh.ChannelOpenError, match="sessions are open"):
            await open_one()


async def test_who_is_refused_too_often_is_sent_away() -> None:
    async with unharmed() as here, guest(here) as connection:
        for number in range(MAX_REFUSALS):
            connection.send_packet(80, String("tcpip-forward"), Boolean(True), String(f"name{number}"), UInt32(80))
            await trio.lowlevel.checkpoint()
        with trio.move_on_after(10):
            await wait(connection, connection.wait_closed())
        assert connection.is_closed()


async def test_keys_are_exchanged_anew_by_the_clock() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay(rekey_interval=0.2) as here,
            local_server(echo) as target,
            client(openssh(here, "-v", "-N", "-R", f"0:{LOCAL}:{target.port}", LOCAL)) as ssh,
        ):
            await here.until_served()
            while ssh.err.count("SSH2_MSG_NEWKEYS received") < 3:
                assert await ask(here.tunnel.client_uri, b"hello") == b"hello"


# What few octets may cost


class Ear:
    """Hears what the relay says from now on, in the place of asyncssh's client and all of its channels."""

    def __init__(self, connection: asyncssh.SSHClientConnection) -> None:
        self.said: list[tuple[int, bytes]] = []  # kinds and bodies of packets
        there: Any = connection
        there.process_packet = self.process_packet
        there._channels = defaultdict(lambda: self, connection._channels)

    def process_packet(self, kind: int, _number: int, packet: SSHPacket) -> bool:
        self.said.append((kind, packet.get_remaining_payload()))
        return True

    def log_received_packet(self, *_packet: object) -> None:
        pass

    def process_connection_close(self, _error: object) -> None:
        pass


def heard(connection: asyncssh.SSHClientConnection) -> list[tuple[int, bytes]]:
    return Ear(connection).said


@pytest.mark.parametrize("kind", [b"\x02" + String(b""), b"\x04\0" + String(b"") * 2, b"\x03" + UInt32(0)])
async def test_who_talks_and_does_not_log_in_is_cut_off_and_penalised(kind: bytes) -> None:
    with trio.fail_after(PATIENCE):
        async with relay(exempt=False) as here:
            for _ in range(FREE_FAILURES + 1):
                await say(here, VERSION, plain(kind) * (PREAUTH_LIMIT // 16 + 100))
            await here.until(lambda: len(here.strangers) == 0)
            assert here.strangers.penalty(LOCAL, trio.current_time()) > 0


async def test_of_sessions_that_are_asked_for_at_once_no_more_begin_either() -> None:
    async with unharmed() as here, guest(here) as connection:
        said = heard(connection)
        for number in range(50):
            connection.send_packet(90, String("session"), UInt32(number), UInt32(1 << 20), UInt32(1 << 15))
        await here.until(lambda: sum(kind in {91, 92} for kind, _ in said) == 50)
        assert [kind for kind, _ in said].count(91) == MAX_SESSIONS


@pytest.mark.parametrize(("most", "is_enough"), [(0, False), (LEAST_PACKET - 1, False), (LEAST_PACKET, True)])
async def test_a_packet_for_each_octet_is_too_much_to_ask_for(most: int, is_enough: bool) -> None:
    async with unharmed() as here, guest(here) as connection:
        said = heard(connection)
        connection.send_packet(80, String("tcpip-forward"), Boolean(True), String(""), UInt32(0))
        await here.until(lambda: any(kind == 81 for kind, _ in said))
        tunnel = list(here.service.tunnels())[-1]
        visitor = await trio.open_tcp_stream(LOCAL, tunnel.client_uri.port)
        await here.until(lambda: any(kind == 90 for kind, _ in said))
        body = SSHPacket(next(body for kind, body in said if kind == 90))
        body.get_string()
        connection.send_packet(91, UInt32(body.get_uint32()), UInt32(7), UInt32(1 << 20), UInt32(most))
        with suppress(trio.BrokenResourceError):
            await visitor.send_all(b"x" * (2 * LEAST_PACKET))
        await here.until(
            lambda: (
                connection.is_closed() or sum(len(body) - 4 for kind, body in said if kind == 94) == 2 * LEAST_PACKET
            )
        )
        assert connection.is_closed() is not is_enough
        assert all(len(body) - 4 <= most for kind, body in said if kind == 94)
        await trio.aclose_forcefully(visitor)


async def test_answers_do_not_pile_up_behind_a_key_exchange_without_an_end() -> None:
    async with unharmed() as here, guest(here) as connection:
        heard(connection)
        connection._send_kexinit()
        connection._kex_complete = True  # as far as our client is concerned
        with suppress(OSError):
            while not connection.is_closed():
                for number in range(100):
                    connection.send_packet(90, String("what"), UInt32(number), UInt32(1), UInt32(1 << 15))
                await trio.sleep(0.001)
        assert connection.is_closed()


async def test_a_screen_that_nobody_reads_is_not_written_on() -> None:
    """Not one word of it leaves, for the session has no credit; and what would wait for that is bounded."""
    screen = Silent()
    board = Terminal(cast("Any", screen), is_terminal=False)
    for _ in range(100):
        board.tell("x" * 2000)
    assert MAX_UNREAD < screen.unread <= MAX_UNREAD + 2000
    screen.unread = 0
    board.tell("read again")
    assert screen.unread == len("read again")


class Silent:
    """A session's channel whose other end reads nothing."""

    unread = 0

    def get_write_buffer_size(self) -> int:
        return self.unread

    def write(self, text: str) -> None:
        self.unread += len(text)


@pytest.mark.parametrize(("length", "is_shown"), [(LONGEST_SCHEME, True), (LONGEST_SCHEME + 1, False)])
async def test_a_picture_is_no_larger_than_an_address_needs(length: int, is_shown: bool) -> None:
    scheme = "s" * length
    with trio.fail_after(PATIENCE):
        async with relay() as here, client(openssh(here, "-R", f"0:{LOCAL}:9", LOCAL, f"qr {scheme}")) as ssh:
            if is_shown:
                await ssh.wait_said(f"{scheme}://", "out")
            else:
                assert await ssh.ended() != 0
                assert "is not answered here" in ssh.err


async def test_of_a_storm_of_small_packets_nothing_is_lost_and_it_comes_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with unharmed() as here, guest(here, encryption_algs=["aes128-gcm@openssh.com"]) as connection:
        said = heard(connection)
        parts, hear, obey = [0], FastConnection.feed, FastConnection._obey

        def begin(self: FastConnection, data: memoryview) -> None:
            parts.append(0)
            hear(self, data)

        def count(self: FastConnection, payload: bytes) -> None:
            parts[-1] += 1
            obey(self, payload)

        monkeypatch.setattr(FastConnection, "feed", begin)
        monkeypatch.setattr(FastConnection, "_obey", count)
        for number in range(20 * MAX_PACKETS_PER_TURN):
            connection.send_packet(90, String("none"), UInt32(number), UInt32(1), UInt32(1 << 15))
        await here.until(lambda: sum(kind == 92 for kind, _ in said) == 20 * MAX_PACKETS_PER_TURN)
        assert [int.from_bytes(body[:4], "big") for kind, body in said if kind == 92] == list(
            range(20 * MAX_PACKETS_PER_TURN)
        )
        assert max(parts) == MAX_PACKETS_PER_TURN
