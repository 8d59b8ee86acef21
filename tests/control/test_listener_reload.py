"""A reload moves the listeners of a running daemon; open connections are not affected."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.control.test_certificate_reload import TLS
from tests.control.test_daemon_auth import HEAD, Running, running
from tests.support.pki import Pki
from tunneld.client import connect
from tunneld.errors import RefusedError, RelayUnreachableError
from tunneld.net.endpoint import Endpoint
from tunneld.tls import contexts


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Running]:
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD)
    async with running(path) as relay:
        yield relay


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def move(relay: Running, **ports: int) -> None:
    """Change the ports of tables in the configuration file."""
    text = relay.path.read_text()
    for table, port in ports.items():
        head, rest = text.split(f"[{table}]\n", 1)
        _line, _, rest = rest.partition("\n")
        text = f"{head}[{table}]\nport = {port}\n{rest}"
    relay.path.write_text(text)


@contextmanager
def tunnel_ends(server: Endpoint, client: Endpoint) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A hidden server and its visitor, at the two ends of a tunnel."""
    with (
        socket.create_connection((server.host, server.port)) as hidden,
        socket.create_connection((client.host, client.port)) as visitor,
    ):
        yield hidden, visitor


async def delivers(one: socket.socket, other: socket.socket) -> bool:
    """Whether a byte sent by one arrives at the other."""
    one.sendall(b"x")
    return await trio.to_thread.run_sync(other.recv, 1) == b"x"


async def test_control_and_relayed_connections_outlive_their_listeners(relay: Running) -> None:
    async with connect(relay.control) as admin:
        uri = Endpoint.parse(await admin.open_tunnel())
        with tunnel_ends(uri, Endpoint.parse(await admin.get_tunnel_address(str(uri)))) as (hidden, visitor):
            assert await delivers(visitor, hidden)
            port = free_port()
            move(relay, control=port)
            items = (await admin.call("reload")).items
            assert [(item["key"], item["needs_restart"]) for item in items] == [("control.port", "no")]
            async with connect(f"tcp://127.0.0.1:{port}") as later:
                assert len(await later.list()) == 1
            with pytest.raises(RelayUnreachableError):
                async with connect(relay.control):
                    pass
            assert (await admin.status())["phase"] == "ready"
            assert await delivers(hidden, visitor)


async def test_a_taken_port_changes_nothing_and_is_named(relay: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        move(relay, control=free_port(), http=port)
        async with connect(relay.control) as admin:
            with pytest.raises(RefusedError, match=f"could not listen on tcp://127.0.0.1:{port}: address already in"):
                await admin.call("reload")
            async with connect(relay.control) as later:
                assert (await later.status())["phase"] == "ready"


async def test_the_http_port_can_be_disabled_and_enabled(relay: Running) -> None:
    address = Endpoint.parse(relay.http.replace("http://", "tcp://"))
    async with connect(relay.control) as admin:
        text = relay.path.read_text()
        relay.path.write_text(text.replace("[http]\n", "[http]\nenabled = false\n"))
        await admin.call("reload")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address.host, address.port))
        relay.path.write_text(text)
        move(relay, http=address.port)
        await admin.call("reload")
        async with await trio.open_tcp_stream(address.host, address.port) as stream:
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")


async def test_tls_added_by_a_reload_applies_to_new_connections(relay: Running) -> None:
    Pki.issue(relay.path.parent)
    async with connect(relay.control) as before:
        uri = await before.open_tunnel("webmux")
        assert uri.startswith("webmux://")
        relay.path.write_text(relay.path.read_text().replace("port = 0\n", f"port = 0\n{TLS}", 1))
        await before.call("reload")
        async with connect(relay.control.replace("tcp:", "tls:"), tls=contexts.unverified_tls_context()) as after:
            (tunnel,) = await after.list()
        old, new = Endpoint.parse(uri), Endpoint.parse(tunnel["server"])
        assert (new.scheme, new.port) == ("webmuxs", old.port)
        assert new.key not in {old.key, ""}  # the old one crossed the network in clear
        assert (await before.status())["phase"] == "ready"


async def test_the_shared_port_moves_and_server_uris_follow(relay: Running) -> None:
    async with connect(relay.control) as admin:
        before = Endpoint.parse(await admin.open_tunnel("webmux"))
        port = free_port()
        move(relay, webmux=port)
        await admin.call("reload")
        (tunnel,) = await admin.list()
        assert Endpoint.parse(tunnel["server"]) == Endpoint(before.scheme, before.host, port, before.key)
        with pytest.raises(RefusedError, match="no open tunnel has the server URI"):
            await admin.get_tunnel_address(str(before))
