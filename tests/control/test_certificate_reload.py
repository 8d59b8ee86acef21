"""Certificates replaced while the daemon runs: new handshakes use the new ones, connections stay open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from tests.control.test_daemon_auth import HEAD, Running, running, table
from tests.support.credentials import SECRET
from tests.support.pki import Pki
from tunneld.client import Client, connect
from tunneld.errors import RefusedError, RelayUnreachableError
from tunneld.net.endpoint import Endpoint
from tunneld.tls import contexts
from tunneld.tls.pins import fingerprint

HTTP_TABLE = "[http]\nport = 0\n"
TLS = 'tls = { certificate = "relay.pem", key = "relay.key" }\n'


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Running]:
    Pki.issue(tmp_path)
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD.replace("port = 0\n", f"port = 0\n{TLS}", 1) + table("root", "admin"))
    async with running(path) as relay:
        yield relay


def root(relay: Running) -> AbstractAsyncContextManager[Client]:
    """An admin client that accepts any certificate."""
    return connect(relay.control, credential=("root", SECRET), tls=contexts.unverified_tls_context())


async def pin_of(relay: Running) -> str:
    """The fingerprint of the certificate shown to a new connection."""
    return await shown_at(Endpoint.parse(relay.control))


async def shown_at(endpoint: Endpoint) -> str:
    async with await trio.open_tcp_stream(endpoint.host, endpoint.port) as transport:
        stream = trio.SSLStream(transport, contexts.unverified_tls_context())
        await stream.do_handshake()
        shown = stream.getpeercert(binary_form=True)
        assert shown is not None
        return fingerprint(shown)


async def test_a_reload_reads_the_files_again_even_if_no_key_has_changed(relay: Running) -> None:
    folder = relay.path.parent
    async with root(relay) as before:
        old = await pin_of(relay)
        new = Pki.issue(folder)
        assert await pin_of(relay) == old != new.pin
        assert (await before.call("reload")).items == []
        assert await pin_of(relay) == new.pin
        assert (await before.status())["phase"] == "ready"
        async with root(relay) as after:
            assert (await after.status())["phase"] == "ready"


async def test_the_http_port_can_start_tls_and_gets_new_files(relay: Running) -> None:
    async with root(relay) as admin:
        text = relay.path.read_text()
        relay.path.write_text(text.replace(HTTP_TABLE, f"{HTTP_TABLE}{TLS}"))
        assert {item["key"] for item in (await admin.call("reload")).items} == {"http.tls.certificate", "http.tls.key"}
        old = await shown_at(Endpoint.parse(relay.http.rstrip("/")))
        new = Pki.issue(relay.path.parent)
        await admin.call("reload")
        assert await shown_at(Endpoint.parse(relay.http.rstrip("/"))) == new.pin != old


@pytest.mark.parametrize("name", ["relay.pem", "relay.key"])
async def test_an_invalid_file_changes_nothing(relay: Running, name: str) -> None:
    old = await pin_of(relay)
    (relay.path.parent / name).write_text("nothing of the kind")
    relay.path.write_text(relay.path.read_text() + "[daemon]\nwatch_backlog = 7\n")
    async with root(relay) as admin:
        with pytest.raises(RefusedError, match=r"relay\.pem"):
            await admin.call("reload")
        assert await pin_of(relay) == old
        relay.path.write_text(relay.path.read_text().replace("watch_backlog = 7", "watch_backlog = 8"))
        Pki.issue(relay.path.parent)
        items = (await admin.call("reload")).items
        assert [(item["key"], item["old"], item["new"]) for item in items] == [("daemon.watch_backlog", "1000", "8")]


async def test_a_client_ca_added_by_a_reload_is_required_from_then_on(relay: Running) -> None:
    text = relay.path.read_text()
    async with root(relay) as admin:
        relay.path.write_text(text.replace(TLS, TLS.replace(" }", ', client_ca = "ca.pem" }')))
        Pki.issue(relay.path.parent)
        assert [item["key"] for item in (await admin.call("reload")).items] == ["control.tls.client_ca"]
        with pytest.raises(RelayUnreachableError):
            async with root(relay):
                pass
        assert (await admin.status())["phase"] == "ready"


async def test_a_reload_reads_the_client_ca_again(tmp_path: Path) -> None:
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD.replace("port = 0\n", f"port = 0\n{TLS}", 1).replace(" }", ', client_ca = "ca.pem" }'))
    Pki.issue(tmp_path)
    old = contexts.unverified_tls_context(tmp_path / "client.pem")
    async with running(path) as relay, connect(relay.control, tls=old) as admin:
        Pki.issue(tmp_path)
        await admin.call("reload")
        with pytest.raises(RelayUnreachableError):
            async with connect(relay.control, tls=old):
                pass
        async with connect(relay.control, tls=contexts.unverified_tls_context(tmp_path / "client.pem")) as later:
            assert (await later.status())["phase"] == "ready"
        assert (await admin.status())["phase"] == "ready"


async def test_status_counts_unauthenticated_connections(relay: Running) -> None:
    endpoint = Endpoint.parse(relay.control)
    async with root(relay) as admin, await trio.open_tcp_stream(endpoint.host, endpoint.port):
        await trio.testing.wait_all_tasks_blocked(0.005)
        status = await admin.status()
        assert [status[key] for key in ("strangers", "strangers_refused", "penalised")] == [1, 0, 0]


@pytest.mark.parametrize(("arguments", "answer"), [((), "stopping"), (("drain",), "draining, then stopping")])
async def test_shutdown_over_tls_is_answered(relay: Running, arguments: tuple[str, ...], answer: str) -> None:
    """Even if the stop comes while the answer is being sent over TLS, which takes several steps."""
    async with root(relay) as admin:
        assert (await admin.call("shutdown", *arguments)).text == answer
