"""The whole daemon with credentials: both ports require authentication, and a reload changes the credentials."""

from __future__ import annotations

import sys
from argparse import Namespace
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tests.support import peers
from tests.support.control import LineClient
from tests.support.credentials import SECRET, credential
from tests.support.peers import PATIENCE, read_exactly
from tests.support.pki import Pki
from tunneld import config
from tunneld.auth.preauth import PreauthLimiter
from tunneld.cli.tables import Form
from tunneld.cli.verbs import pardon, penalties
from tunneld.client import connect
from tunneld.config.keys import keys
from tunneld.daemon import Daemon
from tunneld.errors import NotAllowedError, RefusedError
from tunneld.net.endpoint import Endpoint
from tunneld.wire import scram
from tunneld.wire.verifier import to_base64

HEAD = '[control]\nport = 0\n[http]\nport = 0\n[webmux]\nport = 0\n[tunnels]\nports = "0"\n'
ALICE, ROOT = credential("alice"), credential("root", role="admin")
EYE = credential("eye", role="viewer")


def table(name: str, role: str) -> str:
    verifier = {"alice": ALICE, "root": ROOT, "eye": EYE}[name].proof
    assert verifier is not None
    return f'[[credential]]\nname = "{name}"\nrole = "{role}"\nverifier = "{verifier.reveal()}"\n'


@dataclass
class Running:
    """A running daemon: its configuration file and the addresses of its ports."""

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


async def test_the_control_port_requires_authentication(relay: Running) -> None:
    with pytest.raises(NotAllowedError):
        async with connect(relay.control):
            pass
    async with connect(relay.control, credential=("alice", SECRET)) as client:
        await client.open_tunnel()
        assert [tunnel["owner"].partition("@")[0] for tunnel in await client.list()] == ["alice"]
        with pytest.raises(RefusedError, match="status requires the role admin"):
            await client.status()


async def test_a_viewer_sees_all_tunnels_without_their_keys(relay: Running) -> None:
    relay.path.write_text(relay.path.read_text() + table("eye", "viewer"))
    async with connect(relay.control, credential=("root", SECRET)) as admin:
        await admin.call("reload")
        uri = await admin.open_tunnel("tcp", secure="key")
        async with connect(relay.control, credential=("eye", SECRET)) as viewer:
            (tunnel,) = await viewer.list()
            assert tunnel["server"] == f"{uri.rpartition('/')[0]}/..."
            assert (await viewer.call("show", tunnel["id"])).items[0]["server"] == tunnel["server"]
            assert (await viewer.status())["tunnels"] == 1
            for verb in (("close", tunnel["id"]), ("openTunnel",), ("reload",)):
                with pytest.raises(RefusedError, match="has the role viewer"):
                    await viewer.call(*verb)


async def test_settings_shows_every_key_and_follows_a_reload(relay: Running) -> None:
    async with connect(relay.control, credential=("root", SECRET)) as admin:
        shown = {item["key"]: item.get("value") for item in (await admin.call("settings")).items}
        assert set(shown) == {key.path for key in keys() if not key.repeated}
        assert (shown["control.penalty"], shown["tunnels.bandwidth"]) == ("5.0", None)
        assert SECRET not in str(shown)
        relay.path.write_text(relay.path.read_text().replace("[http]", "penalty = 7.5\n[http]"))
        await admin.call("reload")
        assert (await admin.call("settings", "control.pen")).items == [{"key": "control.penalty", "value": "7.5"}]
        with pytest.raises(RefusedError, match="no key begins with"):
            await admin.call("settings", "nothing.such")


async def test_every_limit_can_be_changed_at_once_without_dropping_connections(relay: Running) -> None:
    """Each number of the configuration, all in one reload, while a visitor is connected."""
    async with connect(relay.control, credential=("root", SECRET)) as admin:
        server_uri = Endpoint.parse(await admin.open_tunnel())
        client_uri = Endpoint.parse(await admin.get_tunnel_address(str(server_uri)))
        server, visitor = await peers.connect(server_uri), await peers.connect(client_uri)
        await visitor.send_all(b"before")
        assert await read_exactly(server, 6) == b"before"
        now = {item["key"]: item.get("value", "") for item in (await admin.call("settings")).items}
        doubled_limits = {key: doubled(number) for key, number in now.items() if is_limit(key, number)}
        tables: dict[str, list[str]] = {}
        for path, number in doubled_limits.items():
            table_name, _, key = path.rpartition(".")
            tables.setdefault(table_name, []).append(f"{key} = {number}")
        text = relay.path.read_text()
        for name, lines in tables.items():
            heading, body = f"[{name}]\n", "\n".join(lines) + "\n"
            text = text.replace(heading, heading + body) if heading in text else f"{heading}{body}{text}"
        relay.path.write_text(text)
        items = (await admin.call("reload")).items
        assert {item["key"] for item in items} == set(doubled_limits)
        assert {item["needs_restart"] for item in items} == {"no"}
        then = {item["key"]: item.get("value", "") for item in (await admin.call("settings")).items}
        assert {key: then[key] for key in doubled_limits} == doubled_limits
        await visitor.send_all(b"after")
        assert await read_exactly(server, 5) == b"after"


def is_limit(key: str, number: str) -> bool:
    """Whether it is a number that a reload applies, other than a port, and a limit at all: twice 0 is the same."""
    others = {"tunnels.accept_backoff", "daemon.spin", "acme.renew_left_short"}  # twice the last one is too much
    return number.replace(".", "").isdigit() and float(number) > 0 and not key.endswith("port") and key not in others


def doubled(number: str) -> str:
    return str(2 * float(number)) if "." in number else str(2 * int(number))


async def test_the_http_port_requires_authentication(relay: Running) -> None:
    host, _, port = relay.http.removeprefix("http://").rpartition(":")
    token = b64encode(f"alice:{SECRET}".encode()).decode()
    for header, status in (("", b"401"), (f"authorization: Bearer {token}\r\n", b"200")):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            request = f"GET /api/v1/list HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{header}\r\n"
            await stream.send_all(request.encode())
            assert (await stream.receive_some(100)).split()[1] == status


async def test_a_reload_removes_a_credential_and_drains_its_tunnels(relay: Running) -> None:
    async with (
        connect(relay.control, credential=("alice", SECRET)) as alice,
        connect(relay.control, credential=("root", SECRET)) as root,
    ):
        await alice.open_tunnel()
        await root.open_tunnel()
        relay.path.write_text(HEAD + table("root", "admin"))
        answer = await root.call("reload")
        assert [item["key"] for item in answer.items] == ["credential.alice"]
        with pytest.raises(RefusedError, match=r"^credential 'alice' was removed or its secret changed"):
            await alice.list()
        await trio.testing.wait_all_tasks_blocked()
        assert [tunnel["owner"].partition("@")[0] for tunnel in await root.list()] == ["root"]


async def test_a_reload_ends_the_watches_of_a_removed_admin(relay: Running) -> None:
    """On both ports: events contain keys, with which a former admin could pose as the hidden server."""
    host, _, port = relay.http.removeprefix("http://").rstrip("/").rpartition(":")
    token = b64encode(f"root:{SECRET}".encode()).decode()
    async with (
        connect(relay.control, credential=("root", SECRET)) as root,
        connect(relay.control, credential=("root", SECRET)) as reloading,
        connect(relay.control, credential=("alice", SECRET)) as alice,
        await trio.open_tcp_stream(host, int(port)) as over_http,
        root.watch() as events,
    ):
        await over_http.send_all(
            f"GET /api/v1/watch HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n\r\n".encode()
        )
        received = b""
        while b"watching" not in received:
            received += await over_http.receive_some()
        relay.path.write_text(HEAD + table("alice", "user"))
        await reloading.call("reload")
        uri = await alice.open_tunnel()
        assert [event["event"] async for event in events] == ["watching"]
        while b"0\r\n\r\n" not in received:
            received += await over_http.receive_some()
        assert uri.encode() not in received


# Penalties


async def fail_as(relay: Running, *names: str, **tls: Any) -> None:
    for name in names:
        with pytest.raises(RefusedError, match="authentication failed; check the name and the secret"):
            async with connect(relay.control, credential=(name, "not the secret"), **tls):
                pass


@pytest.mark.parametrize("encrypted", [False, True])
async def test_an_admin_sees_a_blocked_address_and_lifts_the_block(
    tmp_path: Path, encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreauthLimiter.__init__, "__defaults__", (lambda _host: False, None))  # a remote machine
    pki = Pki.issue(tmp_path)
    path = tmp_path / "tunnel.toml"
    files = f'certificate = "{tmp_path}/relay.pem"\nkey = "{tmp_path}/relay.key"\n'
    tables = table("alice", "user") + table("root", "admin") + (f"[control.tls]\n{files}" if encrypted else "")
    path.write_text(HEAD + tables)
    tls: Any = {"tls": pki.client} if encrypted else {}
    async with running(path) as relay, connect(relay.control, credential=("root", SECRET), **tls) as admin:
        await fail_as(relay, "bob", "bob", "alice", "alice", "alice", **tls)
        alice, *_ = items = (await admin.call("penalties")).items
        assert [(item.get("credential"), item["scope"], item["failures"]) for item in items] == [("alice", "name", "3")]
        with pytest.raises(RefusedError, match=r"'alice': this name is blocked for . s after failed logins with it"):
            async with connect(relay.control, credential=("alice", SECRET), **tls):
                pass
        await fail_as(relay, "carol", **tls)
        with pytest.raises(RefusedError, match=r"'dave': this address is blocked for . s after failed logins from it"):
            async with connect(relay.control, credential=("dave", SECRET), **tls):
                pass
        assert (await admin.call("status")).items[0]["penalised"] == "1"
        shown = await penalties(admin, Namespace(), Form.PEOPLE)
        assert [line.split()[:4] for line in shown.splitlines()] == [
            ["ADDRESS", "SCOPE", "CREDENTIAL", "FAILURES"],
            ["127.0.0.1", "address", "-", "3"],
            ["127.0.0.1", "name", "alice", "3"],
        ]
        assert await pardon(admin, Namespace(address=alice["address"]), Form.PEOPLE) == "pardoned 127.0.0.1\n"
        assert (await admin.call("pardon", "127.0.0.1")).text == "no failed login from 127.0.0.1 is remembered"
        assert await penalties(admin, Namespace(), Form.PEOPLE) == "no penalties\n"
        with pytest.raises(RefusedError, match="'relay' is not an address"):
            await admin.call("pardon", "relay")
        async with connect(relay.control, credential=("alice", SECRET), **tls) as client:
            assert await client.list() == []
            with pytest.raises(RefusedError, match="penalties requires the role admin"):
                await client.call("penalties")


async def test_a_client_of_a_blocked_address_is_told_so_on_a_port_with_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, it only saw a closed connection."""
    monkeypatch.setattr(PreauthLimiter.__init__, "__defaults__", (lambda _host: False, None))
    pki = Pki.issue(tmp_path)
    path = tmp_path / "tunnel.toml"
    files = f'certificate = "{tmp_path}/relay.pem"\nkey = "{tmp_path}/relay.key"\n'
    path.write_text(f"{HEAD}{table('alice', 'user')}[control.tls]\n{files}")
    async with running(path) as relay:
        await fail_as(relay, "bob", "carol", "dave", tls=pki.client)
        match = "refused the connection, in plain text: this address is blocked for . s after failed logins from it"
        with pytest.raises(RefusedError, match=match) as caught:
            async with connect(relay.control, credential=("alice", SECRET), tls=pki.client):
                pass
        assert caught.value.reply_code == "limit"


async def test_the_challenge_of_any_name_survives_a_restart(tmp_path: Path) -> None:
    """Else a client that asks before and after could tell which names exist."""
    path = tmp_path / "tunnel.toml"
    (tmp_path / "carol.secret").write_text(SECRET)
    carol = '[[credential]]\nname = "carol"\nsecret_file = "carol.secret"\n'
    path.write_text(f'{HEAD}[daemon]\nstate = "state"\n{table("alice", "user")}{carol}')
    names = ("alice", "carol", "unknown")
    code = (
        "import sys; from pathlib import Path; from tunneld import config\n"
        "from tunneld.auth.authenticator import Authenticator; from tunneld.config.salts import read_salt_key\n"
        "loaded = config.load(Path(sys.argv[1])); key = read_salt_key(loaded.daemon.state)\n"
        "found = Authenticator(lambda: loaded.credential, clock=lambda: 0.0, salt_key=key)\n"
        "for name in sys.argv[2:]: print(found.verifier_of(name).salt.hex())\n"
    )
    salts = []
    async with running(path) as relay:
        for name in names:
            async with await peers.connect(Endpoint.parse(relay.control)) as stream:
                client = LineClient(stream)
                await client.read_line()
                first = scram.encode(f"n,,n={name},r=abc".encode())
                reply = await client.request(f"auth SCRAM-SHA-256 {first}")
                salts.append(scram.decode(reply.removeprefix("OK ")).decode().split(",")[1].removeprefix("s="))
    command = [sys.executable, "-c", code, str(path), *names]
    later = (await trio.run_process(command, capture_stdout=True)).stdout.decode().split()
    assert [to_base64(bytes.fromhex(salt)) for salt in later] == salts
    assert len(set(salts)) == len(names)
