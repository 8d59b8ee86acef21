"""Crowds: slow, silent, short-lived, or never reading; and nobody else notices."""

from __future__ import annotations

import os
import resource
from contextlib import AsyncExitStack, suppress
from itertools import product
from pathlib import Path

import trio

from tests.support.attackers import crowd, flood
from tests.support.besieged import MIB, besieged, under_attack
from tests.support.keyed import connect_hidden
from tests.support.papers import Papers

HEAD = b"POST /api/v1/list HTTP/1.1\r\nHost: localhost\r\n"

SLOW = {
    "control": ("control", b"lis"),
    "http header": ("http", HEAD + b"X-Slow: "),
    "http body": ("http", HEAD + b"Content-Length: 60000\r\n\r\n{"),
    "webmux": ("webmux", b"\x00\x00"),
    "server side": ("server", b"h"),
    "client side": ("client", b"h"),
}


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
"""How a TLS handshake begins; 500 octets more would make it one."""


FACES = ("control", "http", "webmux", "server")


async def test_who_begins_tls_and_stays(tmp_path: Path, papers: Papers) -> None:
    """Strangers are few, by dice: most of them are sent away, and an operator who is there does not notice."""
    async with besieged(tmp_path, papers) as siege:
        for face, says in product(FACES, (b"", HELLO)):
            print(face, says)
            async with under_attack(siege, 128), siege.ports() as ports, crowd(ports[face], 200, says):
                await siege.check_progress(8 * MIB)
                await siege.check_answers()


async def test_who_comes_to_a_port_with_tls_and_goes(tmp_path: Path, papers: Papers) -> None:
    async with besieged(tmp_path, papers) as siege:
        for face in FACES:
            print(face)
            async with under_attack(siege, 64), siege.ports() as ports:
                await flood(ports[face], 500, HELLO)


async def test_who_says_little_and_stays(tmp_path: Path) -> None:
    """As many as fit below `max_connections` on the faces, `max_parked` and `max_waiting` on a tunnel."""
    async with besieged(tmp_path) as siege:
        for attack, (port, says) in SLOW.items():
            print(attack)
            async with under_attack(siege, 240), siege.ports() as ports, crowd(ports[port], 240, says):
                await siege.check_progress(8 * MIB)
                await siege.check_answers()


async def test_who_never_finishes_a_proxy_header(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        await siege.set("tunnels", 'trusted_proxies = ["127.0.0.1"]')
        async with under_attack(siege, 240), siege.ports() as ports, crowd(ports["client"], 240, b"PROXY TCP4 192."):
            await siege.check_progress(8 * MIB)
            await siege.check_answers()


async def test_who_comes_and_goes(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        for face in (*FACES, "client"):
            print(face)
            async with under_attack(siege, 64), siege.ports() as ports:
                await flood(ports[face], 1000)


async def test_visitors_who_never_read(tmp_path: Path) -> None:
    """The hidden server sends to each what the kernel takes; the relay holds no more than a pipe of it."""
    async with (
        besieged(tmp_path) as siege,
        under_attack(siege, 400),
        siege.ports() as ports,
        crowd(ports["client"], 200),
        crowd(ports["server"], 200, bytes(MIB // 4)),
    ):
        await siege.check_progress(8 * MIB)
        await siege.check_answers()


async def test_visitors_in_tls_who_never_read(tmp_path: Path, papers: Papers) -> None:
    """The same, with all of it deciphered and then held: one buffer each."""
    async with (
        besieged(tmp_path, papers) as siege,
        under_attack(siege, 200),
        siege.ports() as ports,
        AsyncExitStack() as stack,
        crowd(ports["client"], 50),
        trio.open_nursery() as nursery,
    ):
        for _ in range(50):
            server = await connect_hidden(ports["server"], papers)
            stack.push_async_callback(server.aclose)
            nursery.start_soon(insist, server)
        await siege.check_progress(8 * MIB)
        await siege.check_answers()
        nursery.cancel_scope.cancel()


async def insist(stream: trio.SocketStream) -> None:
    """Send, whether it is taken or not."""
    with suppress(trio.BrokenResourceError):
        await stream.send_all(bytes(MIB))


async def test_running_out_of_descriptors_is_survived(tmp_path: Path) -> None:
    """New ones wait or are lost; the bystander goes on, and so does everything once there is room."""
    async with besieged(tmp_path) as siege:
        pid = siege.relay.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        for face in ("client", "control", "http", "webmux"):
            print(face)
            async with under_attack(siege, 240), siege.ports() as ports:
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (siege.relay.descriptors + 50, before[1]))
                async with crowd(ports[face], 100):
                    await siege.check_progress(8 * MIB)
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


async def test_a_log_reader_that_leaves(tmp_path: Path) -> None:
    """Lines are lost, and nothing else; tests/test_log.py has the reader that sleeps and the full disk."""
    async with besieged(tmp_path) as siege:
        stderr = siege.relay.process.stderr
        assert isinstance(stderr, trio.lowlevel.FdStream)
        empty, other = os.pipe()
        os.dup2(empty, stderr.fileno())  # the last reader of the log is gone, and ours sleeps on an empty pipe
        os.close(empty)
        async with under_attack(siege, 64):
            await flood(siege.control, 300, b"\x00\n" * 12)
        os.close(other)
