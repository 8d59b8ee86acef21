"""The records of visitors: what a line has, when it is written, and how it is switched on and off."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from tests.control.test_daemon_auth import HEAD, running
from tests.support.peers import read_exactly
from tunneld import Client, connect
from tunneld.config.schema import TunnelSettings
from tunneld.net.address import HostName
from tunneld.net.endpoint import Endpoint, Peer, format_peer
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.records import VisitorRecord, facts
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import RelayedVisitor

Addresses = Literal["full", "network", "none"]


def record(peer: Peer = ("192.0.2.7", 4242), **known: Any) -> VisitorRecord:
    spec = TunnelSpec(
        id="t4", backend="tcp", options=TunnelOptions(name="blog"), settings=TunnelSettings(), owner="home@192.0.2.1:9",
        requester_host="192.0.2.1", advertised_host="relay", credential="home",
    )  # fmt: skip
    return VisitorRecord(spec, RelayedVisitor(peer, 0.0, **known), 79, 5120, "both sides finished", 1e9, 12.1)


def test_a_record_says_who_what_when_and_how_much() -> None:
    assert facts(record(reached=("198.51.100.1", 20001)), "full") == {
        "time": "2001-09-09T01:46:40.000Z", "began": "2001-09-09T01:46:27.900Z", "seconds": 12.1,
        "tunnel": "t4", "name": "blog", "owner": "home", "visitor": "192.0.2.7:4242", "address": "198.51.100.1:20001",
        "up": 79, "down": 5120, "reason": "both sides finished",
    }  # fmt: skip


def test_a_visitor_of_a_host_name_has_reached_that_name() -> None:
    named = record(host=HostName("blog.example.org"), reached=("198.51.100.1", 443))
    assert facts(named, "full")["address"] == "blog.example.org"


@pytest.mark.parametrize(
    ("peer", "addresses", "shown"),
    [
        (("192.0.2.7", 4242), "network", "192.0.2.0/24"),
        (("2001:db8:1:2::7", 4242), "network", "2001:db8:1::/48"),
        (("fe80::1%eth0", 4242), "network", "fe80::/48"),
        (("", 0), "network", None),
        (("192.0.2.7", 4242), "none", None),
    ],
)
def test_addresses_can_be_shortened(peer: Peer, addresses: Addresses, shown: str | None) -> None:
    assert facts(record(peer), addresses).get("visitor") == shown


# On a relay


@asynccontextmanager
async def visit(admin: Client, source: str) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream, str]]:
    """The two ends of a visitor from this address, and the id of the tunnel."""
    tunnel = await admin.open_described("tcp", persist="yes", name="blog")
    server, client = Endpoint.parse(tunnel["server"]), Endpoint.parse(tunnel["client"])
    hidden = await trio.open_tcp_stream(server.host, server.port)
    visitor = await trio.open_tcp_stream(client.host, client.port, local_address=source)
    async with hidden, visitor:
        await visitor.send_all(b"hello")
        assert await read_exactly(hidden, 5) == b"hello"
        yield hidden, visitor, tunnel["id"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def lines(path: Path, count: int) -> Sequence[dict[str, Any]]:
    """The lines of the file, once there are so many."""
    while len(found := read(path)) < count:
        await trio.lowlevel.checkpoint()
    return found


async def test_each_visitor_leaves_a_line(tmp_path: Path) -> None:
    path, written = tmp_path / "tunnel.toml", tmp_path / "visitors.jsonl"
    path.write_text(f'{HEAD}\n[records]\nfile = "visitors.jsonl"\n')
    async with AsyncExitStack() as stack:
        async with running(path) as relay, connect(relay.control) as admin:
            async with visit(admin, "127.0.0.2") as (_, visitor, tunnel):
                name, reached = format_peer(visitor.socket.getsockname()), format_peer(visitor.socket.getpeername())
            (first,) = await lines(written, 1)
            expected = {"tunnel": tunnel, "name": "blog", "visitor": name, "address": reached, "up": 5, "down": 0}
            assert expected.items() <= first.items()
            assert datetime.fromisoformat(first["began"]) <= datetime.fromisoformat(first["time"])
            async with visit(admin, "127.0.0.3") as (_, _, tunnel):
                await admin.call("kick", tunnel, "127.0.0.3")
                assert (await lines(written, 2))[1]["reason"] == "disconnected by request"
            async with visit(admin, "127.0.0.4") as (_, _, tunnel):
                await admin.close(tunnel)
                assert (await lines(written, 3))[2]["reason"] == "the tunnel closed: closed by request"
            await stack.enter_async_context(visit(admin, "127.0.0.5"))
        assert read(written)[3]["reason"] == "the relay stopped"


async def test_a_reload_switches_records_on_and_off(tmp_path: Path) -> None:
    path, written = tmp_path / "tunnel.toml", tmp_path / "visitors.jsonl"
    path.write_text(HEAD)
    async with running(path) as relay, connect(relay.control) as admin:
        async with visit(admin, "127.0.0.2"):
            path.write_text(f'{HEAD}\n[records]\nfile = "visitors.jsonl"\n')
            await admin.call("reload")
        (first,) = await lines(written, 1)
        assert first["visitor"].startswith("127.0.0.2:")  # of a visitor from before the reload, too
        path.write_text(HEAD)
        await admin.call("reload")
        async with visit(admin, "127.0.0.3") as (_, _, tunnel):
            await admin.close(tunnel)
    assert len(read(written)) == 1
