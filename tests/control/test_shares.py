"""One credential cannot take every connection: not of the control port, of the HTTP port, or of the ssh port."""

from __future__ import annotations

from base64 import b64encode
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tests.backends.ssh.support import client as ssh_client
from tests.backends.ssh.support import make_key, openssh, relay
from tests.http.support import HttpRelay, read_answer, running_http
from tests.support.control import Server, running_server
from tests.support.credentials import SECRET, authenticator_of, credential
from tests.support.peers import PATIENCE, connect
from tunneld import client
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthLimiter
from tunneld.client import Client
from tunneld.config.schema import ControlSettings
from tunneld.errors import RefusedError

ALICE, BOB, ROOT = credential("alice"), credential("bob"), credential("root", role="admin")
PLACES: dict[str, Any] = {"max_connections": 8, "reserved_connections": 2}


async def logged_in(stack: AsyncExitStack, server: Server, name: str) -> Client:
    return await stack.enter_async_context(client.connect(str(server.endpoint), credential=(name, SECRET)))


async def test_one_credential_leaves_control_connections_to_others_and_users_leave_some_to_admins() -> None:
    settings = ControlSettings(**PLACES)
    async with (
        running_server(settings, authenticator=authenticator_of(ALICE, BOB, ROOT)) as server,
        AsyncExitStack() as stack,
    ):
        for _ in range(3):
            await logged_in(stack, server, "alice")
        async with client.connect(str(server.endpoint), credential=("alice", SECRET)):
            with pytest.raises(RefusedError, match=r"credential 'alice' may have 4 of 8 \(control.credential_share\)"):
                await logged_in(stack, server, "alice")
        await logged_in(stack, server, "alice")  # in the place of the one that ended
        for _ in range(2):
            await logged_in(stack, server, "bob")
        with pytest.raises(RefusedError, match="the last 2 of 8 are reserved for admins"):
            await logged_in(stack, server, "bob")
        root = await logged_in(stack, server, "root")
        await root.call("echo", "on")


async def test_unauthenticated_connections_take_no_places_of_authenticated_ones() -> None:
    settings = ControlSettings(max_connections=2, reserved_connections=0, max_startups="8:100:8")
    async with (
        running_server(settings, authenticator=authenticator_of(ALICE, BOB, ROOT)) as server,
        AsyncExitStack() as stack,
    ):
        for _ in range(6):
            silent = await stack.enter_async_context(await connect(server.endpoint))
            await silent.receive_some()
        await logged_in(stack, server, "alice")
        await logged_in(stack, server, "root")
        with pytest.raises(RefusedError, match=r"2 of 2 control connections are open \(control.max_connections\)"):
            await logged_in(stack, server, "bob")


async def test_unauthenticated_http_connections_take_no_places_of_authenticated_ones() -> None:
    preauth = PreauthLimiter(ControlSettings, exempt=lambda _host: False)
    authenticator = Authenticator(lambda: (ALICE,), preauth)
    async with (
        running_http(authenticator=authenticator, max_connections=1, reserved_connections=0) as relay,
        AsyncExitStack() as stack,
    ):
        for _ in range(2):
            assert (await ask(await stack.enter_async_context(await relay.connect()), relay, "", "/healthz"))[0] == 200
        assert (await ask(await stack.enter_async_context(await relay.connect()), relay, "alice"))[0] == 200


async def test_ssh_clients_that_do_not_log_in_take_no_places_of_authenticated_ones(tmp_path: Path) -> None:
    key, line = make_key(tmp_path)
    with trio.fail_after(PATIENCE):
        async with (
            relay([credential("alice", authorized_keys=[line])], max_connections=1, reserved_connections=0) as here,
            AsyncExitStack() as stack,
        ):
            for _ in range(2):
                silent = await trio.open_tcp_stream("127.0.0.1", here.port)
                await stack.enter_async_context(silent)
                assert (await silent.receive_some()).startswith(b"SSH-2.0")
            async with ssh_client(openssh(here, "127.0.0.1", "list", key=key)) as ssh:
                assert await ssh.ended() == 0


async def test_a_refused_login_is_no_failure_and_its_connection_is_closed() -> None:
    settings = ControlSettings(max_connections=2, reserved_connections=0)
    with capture_logs() as logs:
        async with (
            running_server(settings, authenticator=authenticator_of(ALICE)) as server,
            AsyncExitStack() as stack,
        ):
            await logged_in(stack, server, "alice")
            for _ in range(5):  # as many connections as failures would bring a penalty
                with pytest.raises(RefusedError):
                    await logged_in(stack, server, "alice")
    assert not [log for log in logs if log["event"] == "authentication failed"]


async def ask(stream: trio.SocketStream, relay: HttpRelay, name: str, path: str = "/api/v1/list") -> tuple[int, str]:
    head = f"GET {path} HTTP/1.1\r\nhost: {relay.authority}\r\n"
    if name:
        head += f"authorization: Basic {b64encode(f'{name}:{SECRET}'.encode()).decode()}\r\n"
    await stream.send_all(f"{head}\r\n".encode())
    answer = await read_answer(stream)
    return answer.status, answer.body.decode()


async def test_one_credential_leaves_http_connections_to_others_and_users_leave_some_to_probes() -> None:
    authenticator = authenticator_of(ALICE, BOB, ROOT)
    async with running_http(authenticator=authenticator, **PLACES) as relay, AsyncExitStack() as stack:

        async def connected() -> trio.SocketStream:
            return await stack.enter_async_context(await relay.connect())

        for _ in range(4):
            assert (await ask(first := await connected(), relay, "alice"))[0] == 200
        assert (await ask(first, relay, "alice"))[0] == 200  # another request on the same connection
        async with await relay.connect() as refused:
            status, body = await ask(refused, relay, "alice")
        assert status == 503
        assert "credential 'alice' may have 4 of 8 (control.credential_share)" in body
        for _ in range(2):
            assert (await ask(await connected(), relay, "bob"))[0] == 200
        async with await relay.connect() as refused:
            status, body = await ask(refused, relay, "bob")
        assert status == 503
        assert "the last 2 of 8 are reserved for admins" in body
        assert await ask(await connected(), relay, "", "/healthz") == (200, "ok\n")
        assert (await ask(await connected(), relay, "root"))[0] == 200


async def test_a_connection_of_a_proxy_counts_for_the_credential_of_its_latest_request() -> None:
    async with (
        running_http(authenticator=authenticator_of(ALICE, BOB), max_connections=4, reserved_connections=0) as relay,
        AsyncExitStack() as stack,
    ):
        streams = [await stack.enter_async_context(await relay.connect()) for _ in range(3)]
        for stream in streams[:2]:
            assert (await ask(stream, relay, "alice"))[0] == 200
        assert (await ask(streams[0], relay, "bob"))[0] == 200
        assert (await ask(streams[2], relay, "alice"))[0] == 200


async def test_one_credential_leaves_ssh_connections_to_others(tmp_path: Path) -> None:
    keys = {name: make_key(tmp_path, name) for name in ("alice", "bob")}
    credentials = [credential(name, authorized_keys=[line]) for name, (_, line) in keys.items()]
    with trio.fail_after(PATIENCE):
        async with relay(credentials, max_connections=4, reserved_connections=0) as here, AsyncExitStack() as stack:
            for _ in range(2):
                command = openssh(here, "-N", "-R", "0:127.0.0.1:9", "127.0.0.1", key=keys["alice"][0])
                await (await stack.enter_async_context(ssh_client(command))).port()
            async with ssh_client(openssh(here, "127.0.0.1", "list", key=keys["alice"][0])) as third:
                assert await third.ended() == 255
                assert "may have 2 of 4" in third.err
            async with ssh_client(openssh(here, "127.0.0.1", "list", key=keys["bob"][0])) as other:
                assert await other.ended() == 0
