"""`watch since=...`: past events, then those that happen, over the control port and as JSON."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.control.test_daemon_auth import HEAD, Running, running, table
from tests.support.credentials import SECRET
from tunneld import Client, connect
from tunneld.errors import RefusedError
from tunneld.net.endpoint import Endpoint


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Running]:
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD + '[daemon]\nstate = "state"\n' + table("alice", "user") + table("root", "admin"))
    async with running(path) as relay:
        yield relay


async def past(client: Client, ref: str | None = None, since: float = 3600) -> list[str]:
    """The past events, each as its name and tunnel."""
    found = []
    async with client.watch(ref, since=since) as events:
        async for event in events:
            if event["event"] == "live":
                break
            found.append(f"{event['event']} {event.get('id', '-')}")
    return found


async def test_past_events_come_first_and_each_credential_sees_its_own(relay: Running) -> None:
    async with (
        connect(relay.control, credential=("alice", SECRET)) as alice,
        connect(relay.control, credential=("root", SECRET)) as root,
    ):
        blog = await alice.open_described("tcp", name="blog")
        await root.open_described("tcp", name="shop")
        await alice.close(blog["id"])
        assert await past(alice) == ["watching all", "opened t1", "request t1", "closed t1"]
        assert {"opened t1", "opened t2", "closed t1"} <= set(await past(root))
        async with alice.watch(since=60) as events:
            seen = [await anext(events) for _ in range(5)]
            assert [event["event"] for event in seen] == ["watching", "opened", "request", "closed", "live"]
            assert "/" not in seen[1]["server"].partition("://")[2]  # its key
            await root.open_tunnel("tcp")
            async with connect(relay.control, credential=("alice", SECRET)) as other:
                await other.open_tunnel("tcp")
            assert (await anext(events))["id"] == "t4"


async def test_the_past_of_a_tunnel_that_is_closed_can_be_asked_for_by_its_name(relay: Running) -> None:
    async with connect(relay.control, credential=("alice", SECRET)) as alice:
        for _ in range(2):
            await alice.open_tunnel("tcp", name="blog")
        await alice.open_tunnel("tcp", name="shop")
        assert await past(alice, "blog") == ["watching t2", "opened t1", "closed t1", "opened t2"]
        await alice.close("blog")
        seen: list[str] = []
        with pytest.raises(RefusedError, match="no open tunnel is called 'blog'"):
            await collect(alice, "blog", seen)
        assert seen == ["watching", "opened", "closed", "opened", "request", "closed"]
        with pytest.raises(RefusedError, match="no open tunnel"):
            await past(alice, "nothing")


async def collect(client: Client, ref: str, seen: list[str]) -> None:
    async with client.watch(ref, since=60) as events:
        async for event in events:
            seen.append(event["event"])  # noqa: PERF401 - the iteration ends with an error


@pytest.mark.parametrize("words", ["since=soon", "since=0", "for=1h"])
async def test_other_options_are_refused(relay: Running, words: str) -> None:
    key, _, value = words.partition("=")
    async with connect(relay.control, credential=("alice", SECRET)) as alice:
        with pytest.raises(RefusedError, match=key):
            await alice.call("watch", **{key: value})


async def test_a_relay_that_keeps_nothing_says_so(relay: Running) -> None:
    relay.path.write_text(relay.path.read_text() + "[events]\nmax_kept = 0\n")
    async with connect(relay.control, credential=("root", SECRET)) as root:
        await root.call("reload")
        with pytest.raises(RefusedError, match=r"events\.max_kept"):
            await root.call("watch", since="1h")


async def test_past_events_as_json(relay: Running) -> None:
    async with connect(relay.control, credential=("alice", SECRET)) as alice:
        await alice.open_tunnel("tcp", name="blog")
    http, login = Endpoint.parse(relay.http), b64encode(f"alice:{SECRET}".encode()).decode()
    async with await trio.open_tcp_stream(http.host, http.port) as stream:
        head = f"Host: {http.host}:{http.port}\r\nAuthorization: Basic {login}\r\n\r\n"
        await stream.send_all(f"GET /api/v1/watch?since=1h HTTP/1.1\r\n{head}".encode())
        received = b""
        while b'"live"' not in received:
            received += await stream.receive_some()
        events = [json.loads(line) for line in received.split(b"\r\n") if line.startswith(b"{")]
        assert [event["event"] for event in events] == ["watching", "opened", "live"]


async def test_requests_are_told_to_admins_and_to_the_owner_of_the_tunnel(relay: Running) -> None:
    async with (
        connect(relay.control, credential=("alice", SECRET)) as alice,
        connect(relay.control, credential=("root", SECRET)) as root,
        connect(relay.control, credential=("root", SECRET)) as watching,
        watching.watch() as events,
    ):
        await anext(events)
        tunnel = await alice.open_described("tcp", name="blog")
        await root.call("kick", "blog", "203.0.113.5")
        await alice.call("drain", tunnel["id"])
        await root.call("reload")
        with pytest.raises(RefusedError, match="requires the role admin"):
            await alice.call("shutdown")
        seen: list[dict[str, str | None]] = []
        while len(seen) < 3:
            if (event := await anext(events))["event"] == "request":
                seen.append({key: event.get(key) for key in ("verb", "args", "credential", "from", "id")})
        assert seen == [
            {"verb": "kick", "args": "blog 203.0.113.5", "credential": "root", "from": None, "id": tunnel["id"]},
            {"verb": "drain", "args": tunnel["id"], "credential": "alice", "from": "127.0.0.1", "id": tunnel["id"]},
            {"verb": "reload", "args": None, "credential": "root", "from": "127.0.0.1", "id": None},
        ]
