"""Many connections at once: slow, silent, short, or never reading. Other visitors must not notice."""

from __future__ import annotations

import os
import resource
from contextlib import AsyncExitStack, suppress
from itertools import product
from pathlib import Path

import trio

from tests.support.attacked_relay import MIB, attacked_relay, under_attack
from tests.support.attacks import crowd, flood
from tests.support.hidden_servers import connect_hidden
from tests.support.pki import Pki

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
"""The beginning of a ClientHello, of which 500 bytes are missing."""


PORTS = ("control", "http", "webmux", "server")


async def test_incomplete_tls_handshakes(tmp_path: Path, pki: Pki) -> None:
    """Most unauthenticated connections are refused at random, and a connected operator does not notice."""
    async with attacked_relay(tmp_path, pki) as target:
        for name, says in product(PORTS, (b"", HELLO)):
            print(name, says)
            async with under_attack(target, 128), target.ports() as ports, crowd(ports[name], 200, says):
                await target.check_progress(8 * MIB)
                await target.check_answers()


async def test_short_connections_to_ports_with_tls(tmp_path: Path, pki: Pki) -> None:
    async with attacked_relay(tmp_path, pki) as target:
        for name in PORTS:
            print(name)
            async with under_attack(target, 64), target.ports() as ports:
                await flood(ports[name], 500, HELLO)


async def test_connections_that_send_an_incomplete_request(tmp_path: Path) -> None:
    """As many as `max_connections` of the servers, and `max_parked` and `max_waiting` of a tunnel, permit."""
    async with attacked_relay(tmp_path) as target:
        for attack, (port, says) in SLOW.items():
            print(attack)
            async with under_attack(target, 240), target.ports() as ports, crowd(ports[port], 240, says):
                await target.check_progress(8 * MIB)
                await target.check_answers()


async def test_incomplete_proxy_headers(tmp_path: Path) -> None:
    async with attacked_relay(tmp_path) as target:
        await target.set("tunnels", 'trusted_proxies = ["127.0.0.1"]')
        async with under_attack(target, 240), target.ports() as ports, crowd(ports["client"], 240, b"PROXY TCP4 192."):
            await target.check_progress(8 * MIB)
            await target.check_answers()


async def test_short_connections(tmp_path: Path) -> None:
    async with attacked_relay(tmp_path) as target:
        for name in (*PORTS, "client"):
            print(name)
            async with under_attack(target, 64), target.ports() as ports:
                await flood(ports[name], 1000)


async def test_visitors_that_never_read(tmp_path: Path) -> None:
    """The hidden server sends to each as much as the kernel takes, and the relay holds at most one pipe of it."""
    async with (
        attacked_relay(tmp_path) as target,
        under_attack(target, 400),
        target.ports() as ports,
        crowd(ports["client"], 200),
        crowd(ports["server"], 200, bytes(MIB // 4)),
    ):
        await target.check_progress(8 * MIB)
        await target.check_answers()


async def test_visitors_that_never_read_with_tls_server_connections(tmp_path: Path, pki: Pki) -> None:
    """The same with decrypted data: the relay holds one buffer each."""
    async with (
        attacked_relay(tmp_path, pki) as target,
        under_attack(target, 200),
        target.ports() as ports,
        AsyncExitStack() as stack,
        crowd(ports["client"], 50),
        trio.open_nursery() as nursery,
    ):
        for _ in range(50):
            server = await connect_hidden(ports["server"], pki)
            stack.push_async_callback(server.aclose)
            nursery.start_soon(insist, server)
        await target.check_progress(8 * MIB)
        await target.check_answers()
        nursery.cancel_scope.cancel()


async def insist(stream: trio.SocketStream) -> None:
    """Send, and ignore a broken connection."""
    with suppress(trio.BrokenResourceError):
        await stream.send_all(bytes(MIB))


async def test_running_out_of_descriptors(tmp_path: Path) -> None:
    """New connections wait or are lost; existing ones go on, and the relay recovers."""
    async with attacked_relay(tmp_path) as target:
        pid = target.relay.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        for name in ("client", "control", "http", "webmux"):
            print(name)
            async with under_attack(target, 240), target.ports() as ports:
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (target.relay.descriptors + 50, before[1]))
                async with crowd(ports[name], 100):
                    await target.check_progress(8 * MIB)
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


async def test_a_log_reader_that_closes_the_pipe(tmp_path: Path) -> None:
    """Only log lines are lost. See tests/daemon/test_log.py for a stalled reader and a full disk."""
    async with attacked_relay(tmp_path) as target:
        stderr = target.relay.process.stderr
        assert isinstance(stderr, trio.lowlevel.FdStream)
        empty, other = os.pipe()
        os.dup2(empty, stderr.fileno())  # the last reader of the log is gone, and ours sleeps on an empty pipe
        os.close(empty)
        async with under_attack(target, 64):
            await flood(target.control, 300, b"\x00\n" * 12)
        os.close(other)
