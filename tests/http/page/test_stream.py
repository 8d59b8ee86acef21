"""The stream of a page: what it shows, to whom, how many there may be, and when it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from tests.http.page.support import Tab, streaming
from tests.http.support import HttpRelay, running_http
from tests.support.credentials import authenticator_of, credential
from tests.support.peers import connect
from tunneld.auth.authenticator import Authenticator
from tunneld.config.credentials import Credential
from tunneld.http.page.feed import Feed
from tunneld.net.endpoint import Endpoint, format_peer

ALICE, BOB = credential("alice"), credential("bob")
ROOT, EYE = credential("root", role="admin"), credential("eye", role="viewer")
FAST = {"interval": 0.05}


@pytest.fixture
async def relay() -> AsyncIterator[HttpRelay]:
    async with running_http(authenticator=authenticator_of(ALICE, BOB, ROOT, EYE), page=FAST) as relay:
        yield relay


async def logged_in(relay: HttpRelay, name: str) -> Tab:
    tab = Tab(relay)
    assert (await tab.log_in(name)).status == 200
    return tab


async def opened(tab: Tab) -> str:
    """Open a persistent tunnel; its id."""
    answer = await tab.post("/api/v1/openTunnel", {"args": ["tcp", "described"], "options": {"persist": "yes"}})
    assert answer.status == 200, answer.text
    return str(answer.json["items"][0]["id"])


async def tunnels_of(messages: Any, count: int) -> dict[str, Any]:
    """The tunnels in the next snapshot with this many."""
    found: dict[str, Any] = {}
    while True:
        snapshot = await messages.next("snapshot")
        found = {} if snapshot["full"] else found
        for gone in snapshot["gone"]:
            found.pop(gone, None)
        found |= {tunnel["id"]: tunnel for tunnel in snapshot["tunnels"]}
        if len(found) == count and snapshot["total"] == count:
            return found


# What it shows


async def test_each_user_sees_its_own_tunnels_and_an_admin_or_viewer_all(relay: HttpRelay) -> None:
    alice, bob = await logged_in(relay, "alice"), await logged_in(relay, "bob")
    ids = {"alice": await opened(alice), "bob": await opened(bob)}
    for name, visible in (("alice", {"alice"}), ("bob", {"bob"}), ("root", set(ids)), ("eye", set(ids))):
        tab = await logged_in(relay, name)
        async with streaming(tab) as messages:
            hello = await messages.next("hello")
            assert (hello["name"], hello["session"]) == (name, True)
            assert set(await tunnels_of(messages, len(visible))) == {ids[one] for one in visible}


async def test_the_key_of_a_tunnel_is_not_sent(relay: HttpRelay) -> None:
    alice = await logged_in(relay, "alice")
    identity = await opened(alice)
    async with streaming(alice) as messages:
        (tunnel,) = (await tunnels_of(messages, 1)).values()
    assert (tunnel["id"], "server" in tunnel) == (identity, False)


async def test_only_what_has_changed_is_sent_again(relay: HttpRelay) -> None:
    alice = await logged_in(relay, "alice")
    async with streaming(alice) as messages:
        await messages.next("snapshot")
        first = await opened(alice)
        await tunnels_of(messages, 1)
        snapshot = await messages.next("snapshot")
        assert (snapshot["full"], snapshot["tunnels"], snapshot["total"]) == (False, [], 1)
        assert (await alice.verb("close", first)).status == 200
        while not (snapshot := await messages.next("snapshot"))["gone"]:
            pass
        assert (snapshot["gone"], snapshot["total"]) == ([first], 0)


async def test_the_visitors_of_the_open_tunnel_are_shown_and_can_be_kicked(relay: HttpRelay) -> None:
    root = await logged_in(relay, "root")
    identity = await opened(root)
    uris = (await root.verb("show", identity)).json["items"][0]
    server, client = Endpoint.parse(uris["server"]), Endpoint.parse(uris["client"])
    async with await connect(server) as hidden, await connect(client) as visitor, streaming(root, identity) as messages:
        await hidden.send_all(b"hello")
        assert await visitor.receive_some(5) == b"hello"
        while not (shown := (await messages.next("snapshot"))["visitors"]) or not shown["rows"]:
            pass
        (row,) = shown["rows"]
        assert row["visitor"] == format_peer(visitor.socket.getsockname())
        assert (await root.verb("kick", identity, row["visitor"])).status == 200
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some(1)
        while (await messages.next("snapshot"))["visitors"]["rows"]:
            pass


async def test_events_continue_after_the_last_one_that_a_page_has(relay: HttpRelay) -> None:
    alice = await logged_in(relay, "alice")
    async with streaming(alice) as messages:
        await messages.next("snapshot")
        first = await opened(alice)
        events = await messages.next("events")
        assert [event["id"] for event in events if event["event"] == "opened"] == [first]
        last = messages.last_id
    second = await opened(alice)
    async with streaming(alice, last_id=last) as messages:
        events = await messages.next("events")
    assert {event["id"] for event in events} == {second}


# Limits and ends


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_streams": 1}, "http.page.max_streams"),
        ({"max_streams_per_credential": 1}, "http.page.max_streams_per_credential"),
    ],
)
async def test_the_number_of_streams_is_limited(keys: dict[str, int], message: str) -> None:
    async with running_http(authenticator=authenticator_of(ALICE, BOB), page=FAST | keys) as relay:
        alice = await logged_in(relay, "alice")
        async with streaming(alice) as messages:
            await messages.next("snapshot")
            refused = await alice.get("/page/stream")
            assert (refused.status, message in refused.text) == (503, True)
        async with streaming(alice) as messages:
            await messages.next("snapshot")


async def test_a_stream_needs_the_token_and_not_only_the_cookie(relay: HttpRelay) -> None:
    alice = await logged_in(relay, "alice")
    alice.token = ""
    assert (await alice.get("/page/stream")).status == 401


async def test_a_stream_ends_with_its_session(relay: HttpRelay) -> None:
    alice = await logged_in(relay, "alice")
    async with streaming(alice) as messages:
        await messages.next("snapshot")
        await alice.post("/page/logout")
        assert await messages.next("end") is not None


async def test_a_stream_ends_when_its_credential_is_removed() -> None:
    credentials: list[Credential] = [ALICE, BOB]
    async with running_http(authenticator=Authenticator(lambda: credentials), page=FAST) as relay:
        alice = await logged_in(relay, "alice")
        async with streaming(alice) as messages:
            await messages.next("snapshot")
            credentials.remove(ALICE)
            assert await messages.next("end") is not None


@pytest.mark.interpreted
async def test_a_bug_ends_a_stream_and_the_next_one_begins_anew(
    relay: HttpRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    alice = await logged_in(relay, "alice")
    async with streaming(alice) as messages:
        await messages.next("snapshot")
        with monkeypatch.context() as patch:
            patch.setattr(Feed, "_note", fail)
            identity = await opened(alice)
            assert await messages.next("") is None  # the end of the response
    async with streaming(alice) as messages:
        assert set(await tunnels_of(messages, 1)) == {identity}
