"""Random data, endless requests and wrong secrets, on every port."""

from __future__ import annotations

import os
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.attacked_relay import KIB, MIB, AttackedRelay, attacked_relay, under_attack
from tests.support.attacks import crowd, flood, send_endlessly, send_in_tls, send_random
from tests.support.peers import PATIENCE, read_all
from tests.support.pki import Pki
from tunneld.wire import scram
from tunneld.wire.scram import ScramClient

SEED = int(os.environ.get("TUNNELD_FUZZ_SEED", "7010"))
"""Seed of the random data; printed when a test fails."""

BEGINNINGS = {
    "control lines": ("control", b""),
    "control words": ("control", b"openTunnel tcp "),
    "tls where there is none": ("control", b"\x16\x03\x01"),
    "http": ("http", b""),
    "http header": ("http", b"GET / HTTP/1.1\r\n"),
    "xml": ("http", b"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nContent-Length: 512\r\n\r\n"),
    "webmux": ("webmux", b""),
    "webmux, a fragment": ("webmux", b"\x08\x00\x00\x00"),
    "server side": ("server", b""),
    "proxy header 1": ("client", b"PROXY "),
    "proxy header 2": ("client", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11"),
}


async def test_random_data(tmp_path: Path) -> None:
    print("TUNNELD_FUZZ_SEED =", SEED)
    async with attacked_relay(tmp_path) as target:
        await target.set("tunnels", 'trusted_proxies = ["127.0.0.1"]')
        for name, (port, beginning) in BEGINNINGS.items():
            print(name)
            async with under_attack(target, 200), target.ports() as ports:
                await send_random(ports[port], beginning, SEED, 200)
        assert not bugs(target)


def bugs(target: AttackedRelay) -> list[dict[str, Any]]:
    """Log lines with a traceback."""
    return [line for line in target.relay.log if "exc_info" in line or "exception" in line]


TLS = {
    "a record": b"",
    "a hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "an alert": b"\x15\x03\x03\x00\x02",
    "application data": b"\x17\x03\x03\x40\x00",
}


async def test_random_data_on_ports_with_tls(tmp_path: Path, pki: Pki) -> None:
    print("TUNNELD_FUZZ_SEED =", SEED)
    async with attacked_relay(tmp_path, pki) as target:
        async with under_attack(target, 200), target.ports() as ports:
            for port, beginning in product(("control", "http", "webmux", "server"), TLS.values()):
                await send_random(ports[port], beginning, SEED, 25)
        assert not bugs(target)


async def test_random_data_inside_tls(tmp_path: Path, pki: Pki) -> None:
    """After a valid handshake: as a key, as frames of a carrier, as requests."""
    print("TUNNELD_FUZZ_SEED =", SEED)
    dice = random.Random(SEED)
    async with attacked_relay(tmp_path, pki) as target:
        async with under_attack(target, 20), target.ports() as ports:
            for port, size in product(("control", "http", "webmux", "server"), (1, 100, 4000)):
                for _ in range(4):
                    await send_in_tls(ports[port], pki, dice.randbytes(size))
        assert not bugs(target)


async def test_many_wrong_keys(tmp_path: Path, pki: Pki) -> None:
    async with attacked_relay(tmp_path, pki) as target, under_attack(target, 20), target.ports() as ports:
        for _ in range(100):
            await send_in_tls(ports["server"], pki, b"0123456789abcdef0123456789abcdef\n")
        with trio.fail_after(PATIENCE):
            while sum(line["event"] == "authentication failed" for line in target.relay.log) < 100:
                await trio.lowlevel.checkpoint()


XML, JSON = ("/RPC2", "text/xml"), ("/api/v1/list", "application/json")
NUMBER = b"9" * 60_000
LAUGHS = b"".join(b'<!ENTITY e%d "%s">' % (n, b"&e%d;" % (n - 1) * 10) for n in range(1, 40))
CALL = b"<methodCall><methodName>list</methodName><params><param><value>"

BOMBS = {
    "entities": (*XML, b"<!DOCTYPE a [" + LAUGHS + b"]>&e39;"),
    "an entity from elsewhere": (*XML, b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><a>&e;</a>'),
    "depth in XML": (*XML, CALL + b"<array><data><value>" * 3000),
    "attributes": (*XML, b"<methodCall " + b"".join(b'a%d="" ' % n for n in range(6000)) + b"/>"),
    "a number in XML": (*XML, CALL + b"<int>" + NUMBER + b"</int></value></param></params></methodCall>"),
    "depth in JSON": (*JSON, b"[" * 60_000),
    "a number in JSON": (*JSON, b'{"args":[' + NUMBER + b"]}"),
}


async def test_bodies_that_expand_when_parsed(tmp_path: Path) -> None:
    """Small bodies that expand when parsed, all within the maximum size of a body."""
    async with attacked_relay(tmp_path) as target:
        for name, (path, kind, body) in BOMBS.items():
            print(name)
            assert len(body) <= 64 * KIB
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            async with under_attack(target, 64):
                await flood(target.http, 100, head.encode() + body)
        assert not bugs(target)


async def test_an_endless_line(tmp_path: Path) -> None:
    """The line is refused after 4 KiB. At most 4 MiB on their way are read and discarded, so that the error arrives."""
    async with attacked_relay(tmp_path) as target, under_attack(target, 1):
        assert await send_endlessly(target.control, b"", bytes(64 * KIB).replace(b"\0", b"a"), 64 * MIB) < 64 * MIB


@pytest.mark.parametrize("path", ["/RPC2", "/api/v1/openTunnel"])
async def test_an_endless_body(tmp_path: Path, path: str) -> None:
    kind = "text/xml" if path == "/RPC2" else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"[" * 0x10000 + b"\r\n"
    async with attacked_relay(tmp_path) as target, under_attack(target, 1):
        assert await send_endlessly(target.http, head.encode(), chunk, 64 * MIB) < 64 * MIB


async def test_many_wrong_secrets(tmp_path: Path) -> None:
    wrong = f"auth SCRAM-SHA-256 {scram.encode(b'n,,n=root,r=x')}\nauth {scram.encode(b'c=biws,r=x,p=AAAA')}\n" * 3
    async with attacked_relay(tmp_path) as target:
        await target.ask_for_secrets()
        async with target.stay(), under_attack(target, 64):
            await flood(target.control, 300, wrong.encode())


async def test_a_recorded_login_cannot_be_replayed(tmp_path: Path) -> None:
    """The relay's nonce is different each time, so the proof of one login is not valid in another."""
    async with attacked_relay(tmp_path) as target:
        await target.ask_for_secrets()
        login = ScramClient("root", "correct horse battery", "overheard")
        hello = f"auth SCRAM-SHA-256 {scram.encode(login.message)}\n".encode()
        async with under_attack(target, 2):
            async with crowd(target.control, 1, hello) as (overheard,):
                said = b""
                while said.count(b"\n") < 2:
                    said += await overheard.receive_some()
                challenge = scram.decode(said.split(b"\n")[1].removeprefix(b"OK ").decode())
                final = f"auth {scram.encode(login.prove(challenge).message)}\n".encode()
            async with crowd(target.control, 1, hello + final + b"list\nquit\n") as (replayed,):
                answers = (await read_all(replayed)).splitlines()
        assert answers[1].startswith(b"OK ")
        assert [answer.split()[1] for answer in answers[2:4]] == [b"not-allowed", b"not-allowed"]
