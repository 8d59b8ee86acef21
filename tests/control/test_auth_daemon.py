"""The whole daemon with credentials: both faces ask, and a reload changes who may."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.credentials import SECRET, credential
from tests.support.people import PATIENCE
from tunneld import config
from tunneld.client import connect
from tunneld.daemon import Daemon
from tunneld.errors import NotAllowedError, RefusedError

HEAD = '[control]\nport = 0\n[http]\nport = 0\n[webmux]\nport = 0\n[tunnels]\nports = "0"\n'
ALICE, ROOT = credential("alice"), credential("root", role="admin")


def table(name: str, role: str) -> str:
    verifier = {"alice": ALICE, "root": ROOT}[name].proof
    assert verifier is not None
    return f'[[credential]]\nname = "{name}"\nrole = "{role}"\nverifier = "{verifier.reveal()}"\n'


@dataclass
class Running:
    """A daemon, its file, and where it listens."""

    path: Path
    control: str
    http: str


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Running]:
    with capture_logs() as logs, trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            daemon = Daemon(config.load(path), path, lambda: config.load(path))
            nursery.start_soon(daemon.run)
            while not any(log["event"] == "ready" for log in logs):
                await trio.testing.wait_all_tasks_blocked()
            found = {log["event"]: log["uri"] for log in logs if "uri" in log}
            yield Running(path, found["control listens"], found["http listens"])
            daemon.shutdown(drain=False)


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Running]:
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD + table("alice", "user") + table("root", "admin"))
    async with running(path) as relay:
        yield relay


async def test_the_line_face_asks(relay: Running) -> None:
    with pytest.raises(NotAllowedError):
        async with connect(relay.control):
            pass
    async with connect(relay.control, credential=("alice", SECRET)) as client:
        await client.open_tunnel()
        assert [tunnel["owner"].partition("@")[0] for tunnel in await client.list()] == ["alice"]
        with pytest.raises(RefusedError, match="status is for admins"):
            await client.status()


async def test_the_http_face_asks(relay: Running) -> None:
    host, _, port = relay.http.removeprefix("http://").rpartition(":")
    token = b64encode(f"alice:{SECRET}".encode()).decode()
    for header, status in (("", b"401"), (f"authorization: Bearer {token}\r\n", b"200")):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            request = f"GET /api/v1/list HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{header}\r\n"
            await stream.send_all(request.encode())
            assert (await stream.receive_some(100)).split()[1] == status


async def test_a_reload_takes_a_credential_and_its_tunnels_away(relay: Running) -> None:
    async with (
        connect(relay.control, credential=("alice", SECRET)) as alice,
        connect(relay.control, credential=("root", SECRET)) as root,
    ):
        await alice.open_tunnel()
        await root.open_tunnel()
        relay.path.write_text(HEAD + table("root", "admin"))
        answer = await root.call("reload")
        assert [item["key"] for item in answer.items] == ["credential.alice"]
        with pytest.raises(RefusedError, match="authenticate first"):
            await alice.list()
        await trio.testing.wait_all_tasks_blocked()
        assert [tunnel["owner"].partition("@")[0] for tunnel in await root.list()] == ["root"]
