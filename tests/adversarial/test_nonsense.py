"""Nonsense, endless words and wrong secrets, on every face."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.attackers import babble, crowd, flood, pour
from tests.support.besieged import KIB, MIB, besieged, under_attack
from tests.support.people import read_all
from tunneld.wire import scram
from tunneld.wire.scram import Login

SEED = int(os.environ.get("TUNNELD_FUZZ_SEED", "7010"))
"""Set it to try others; a failure prints it."""

BEGINNINGS = {
    "control lines": ("control", b""),
    "control words": ("control", b"openTunnel tcp "),
    "tls where there is none": ("control", b"\x16\x03\x01"),
    "http": ("http", b""),
    "http header": ("http", b"GET / HTTP/1.1\r\n"),
    "xml": ("http", b"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nContent-Length: 512\r\n\r\n"),
    "server side": ("server", b""),
    "proxy header 1": ("client", b"PROXY "),
    "proxy header 2": ("client", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11"),
}


@pytest.mark.parametrize("face", BEGINNINGS)
async def test_seeded_nonsense(tmp_path: Path, face: str) -> None:
    print("TUNNELD_FUZZ_SEED =", SEED)
    port, beginning = BEGINNINGS[face]
    async with besieged(tmp_path) as siege:
        await siege.set("tunnels", 'trusted_proxies = ["127.0.0.1"]')
        async with under_attack(siege, 200), siege.ports() as ports:
            await babble(ports[port], beginning, SEED, 200)
        assert not [line for line in siege.relay.log if "exc_info" in line or "exception" in line]


async def test_an_endless_line(tmp_path: Path) -> None:
    """Cut off after 4 KiB; what was on the way is read away, 4 MiB at most, so that the reason arrives."""
    async with besieged(tmp_path) as siege, under_attack(siege, 1):
        assert await pour(siege.control, b"", bytes(64 * KIB).replace(b"\0", b"a"), 64 * MIB) < 64 * MIB


@pytest.mark.parametrize("path", ["/RPC2", "/api/v1/openTunnel"])
async def test_an_endless_body(tmp_path: Path, path: str) -> None:
    kind = "text/xml" if path == "/RPC2" else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"[" * 0x10000 + b"\r\n"
    async with besieged(tmp_path) as siege, under_attack(siege, 1):
        assert await pour(siege.http, head.encode(), chunk, 64 * MIB) < 64 * MIB


async def test_wrong_secrets_at_speed(tmp_path: Path) -> None:
    wrong = f"auth SCRAM-SHA-256 {scram.encode(b'n,,n=root,r=x')}\nauth {scram.encode(b'c=biws,r=x,p=AAAA')}\n" * 3
    async with besieged(tmp_path) as siege:
        await siege.ask_for_secrets()
        async with under_attack(siege, 64):
            await flood(siege.control, 300, wrong.encode())


async def test_a_login_that_was_overheard_opens_nothing(tmp_path: Path) -> None:
    """The relay's nonce is another each time, so the proof of one login proves nothing in the next."""
    async with besieged(tmp_path) as siege:
        await siege.ask_for_secrets()
        login = Login("root", "correct horse battery", "overheard")
        hello = f"auth SCRAM-SHA-256 {scram.encode(login.message)}\n".encode()
        async with under_attack(siege, 2):
            async with crowd(siege.control, 1, hello) as (overheard,):
                said = b""
                while said.count(b"\n") < 2:
                    said += await overheard.receive_some()
                challenge = scram.decode(said.split(b"\n")[1].removeprefix(b"OK ").decode())
                final = f"auth {scram.encode(login.prove(challenge).message)}\n".encode()
            async with crowd(siege.control, 1, hello + final + b"list\nquit\n") as (replayed,):
                answers = (await read_all(replayed)).splitlines()
        assert answers[1].startswith(b"OK ")
        assert [answer.split()[1] for answer in answers[2:4]] == [b"not-allowed", b"not-allowed"]
