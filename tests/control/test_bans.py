"""Visitors are disconnected, and networks kept out, on request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.control.test_daemon_auth import HEAD, running
from tests.support.peers import read_exactly
from tunneld import Client, connect
from tunneld.errors import RefusedError
from tunneld.net.endpoint import Endpoint, format_peer


@dataclass
class Visited:
    """A tunnel of a real relay."""

    relay: str
    admin: Client
    id: str
    server: Endpoint
    client: Endpoint

    @asynccontextmanager
    async def visitor(self, source: str) -> AsyncIterator[trio.SocketStream]:
        """A visitor from this address that is relayed."""
        hidden = await trio.open_tcp_stream(self.server.host, self.server.port)
        visitor = await self.connect(source)
        async with hidden, visitor:
            await hidden.send_all(b"welcome")
            assert await read_exactly(visitor, 7) == b"welcome"
            yield visitor

    async def connect(self, source: str) -> trio.SocketStream:
        return await trio.open_tcp_stream(self.client.host, self.client.port, local_address=source)


@pytest.fixture
async def tunnel(tmp_path: Path) -> AsyncIterator[Visited]:
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD)
    async with running(path) as relay, connect(relay.control) as admin:
        server = await admin.open_tunnel("tcp", persist="yes")
        address = await admin.get_tunnel_address(server)
        (item,) = await admin.list()
        yield Visited(relay.control, admin, item["id"], Endpoint.parse(server), Endpoint.parse(address))


async def is_cut(stream: trio.SocketStream) -> None:
    with pytest.raises(trio.BrokenResourceError):  # a reset, never an end of file
        await stream.receive_some()


async def test_one_visitor_is_kicked(tunnel: Visited) -> None:
    async with tunnel.visitor("127.0.0.2") as noisy, tunnel.visitor("127.0.0.2") as quiet:
        name = format_peer(noisy.socket.getsockname())
        async with connect(tunnel.relay) as watching, watching.watch(tunnel.id) as events:
            assert (await tunnel.admin.call("kick", tunnel.id, name)).text == f"disconnected 1 visitor of {tunnel.id}"
            event: Mapping[str, str] = {}
            while event.get("event") != "left":
                event = await anext(events)
            assert (event["from"], event["reason"]) == (name, "disconnected by request")
        await is_cut(noisy)
        assert (await tunnel.admin.call("kick", tunnel.id, name)).text == f"disconnected 0 visitors of {tunnel.id}"
        await tunnel.admin.call("kick", tunnel.id, "127.0.0.0/8")
        await is_cut(quiet)
    async with tunnel.visitor("127.0.0.2"):
        pass  # it may come again
    with pytest.raises(RefusedError, match="nobody"):
        await tunnel.admin.call("kick", tunnel.id, "nobody")


async def test_a_banned_network_is_kept_out_until_the_ban_is_lifted(tunnel: Visited) -> None:
    async with tunnel.visitor("127.0.0.2") as banned, tunnel.visitor("127.0.0.3") as welcome:
        reply = await tunnel.admin.call("ban", "127.0.0.2", "60")
        assert reply.text == "banned 127.0.0.2/32 for 60 s, disconnected 1 visitor"
        await is_cut(banned)
        with pytest.raises((trio.BrokenResourceError, OSError)):  # perhaps before `connect` has returned
            async with await tunnel.connect("127.0.0.2") as again:
                await again.receive_some()
        async with tunnel.visitor("127.0.0.3"):
            pass
        (item,) = (await tunnel.admin.call("bans")).items
        assert (item["network"], 0 < int(item["left"]) <= 60) == ("127.0.0.2/32", True)
        assert (await tunnel.admin.call("show", tunnel.id)).items[0]["refused"] == "1"
        assert (await tunnel.admin.call("unban", "127.0.0.2")).text == "lifted the ban of 127.0.0.2/32"
        async with tunnel.visitor("127.0.0.2"):
            pass
        await welcome.send_all(b"still here")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ban", "127.0.0.0/8"), "contains your own address"),
        (("ban", "nobody"), "nobody"),
        (("ban", "192.0.2.1", "2592001"), "at most 2592000 s"),
        (("ban", "192.0.2.1", "soon"), "'soon' is"),
        (("unban", "192.0.2.1"), "is not banned"),
    ],
)
async def test_what_cannot_be_banned(tunnel: Visited, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        await tunnel.admin.call(*arguments)
    assert (await tunnel.admin.call("bans")).items == []
