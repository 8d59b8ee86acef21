"""Every verb with every role, for tunnels of the same and of another credential; limits of grants."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import pytest
import trio

from tests.http.support import FakeDaemon
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.control.commands import COMMANDS, executor
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.errors import LimitReachedError, NoSuchTunnelError, NotAllowedError, TunneldError, UsageError
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.tunnel import events
from tunneld.tunnel.events import Event, Watcher
from tunneld.wire.lines import Item, parse_request

ALICE, BOB, ROOT, EYE = Grant("alice"), Grant("bob"), Grant("root", Role.ADMIN), Grant("eye", Role.VIEWER)
GRANTS: dict[str, Grant | None] = {"user": ALICE, "viewer": EYE, "admin": ROOT, "unauthenticated": None}


@dataclass
class TwoTunnels:
    """A relay with two tunnels, one of alice and one of bob."""

    daemon: FakeDaemon
    of_alice: str
    of_bob: str

    async def request(self, grant: Grant | None, line: str) -> Reply:
        owner = f"{grant.name}@127.0.0.1:9" if grant else "127.0.0.1:9"
        caller = Requester("127.0.0.1", owner, "127.0.0.1", grant)
        return await executor(self.daemon)(parse_request(line.encode()), caller)

    async def outcome(self, grant: Grant | None, line: str) -> str:
        """The code of the error, or ok."""
        try:
            reply = await self.request(grant, line)
        except TunneldError as error:
            return error.code
        if reply.stream:
            await reply.stream.aclose()
        return "ok"


@pytest.fixture
async def relay(service: TunnelService) -> TwoTunnels:
    relay = TwoTunnels(FakeDaemon(Settings(tunnels=TunnelSettings(ports="0")), service), "", "")
    relay.of_alice = (await relay.request(ALICE, "openTunnel")).text
    relay.of_bob = (await relay.request(BOB, "openTunnel")).text
    return relay


#                        user, own    user, other's     viewer         admin   unauthenticated
ABOUT_A_TUNNEL = {
    "getTunnelAddress {}": ("ok", "no-such-tunnel", "ok", "ok", "not-allowed"),
    "show {}": ("ok", "no-such-tunnel", "ok", "ok", "not-allowed"),
    "watch {}": ("ok", "no-such-tunnel", "ok", "ok", "not-allowed"),
    "share {} 60": ("usage", "no-such-tunnel", "not-allowed", "usage", "not-allowed"),  # they have no host name
    "set {} bandwidth=1M": ("ok", "no-such-tunnel", "not-allowed", "ok", "not-allowed"),
    "trim {} 0": ("ok", "no-such-tunnel", "not-allowed", "ok", "not-allowed"),
    "kick {} 192.0.2.7": ("ok", "no-such-tunnel", "not-allowed", "ok", "not-allowed"),
    "drain {}": ("ok", "no-such-tunnel", "not-allowed", "ok", "not-allowed"),
    "join {}": ("ok", "no-such-tunnel", "not-allowed", "ok", "not-allowed"),
    "leave {}": ("ok", "no-such-tunnel", "not-allowed", "ok", "not-allowed"),
    "close {}": ("ok", "no-such-tunnel", "not-allowed", "ok", "not-allowed"),
}
#              user   viewer   admin   unauthenticated
ABOUT_ALL = {
    "openTunnel": ("ok", "not-allowed", "ok", "not-allowed"),
    "list": ("ok", "ok", "ok", "not-allowed"),
    "reservations": ("ok", "ok", "ok", "not-allowed"),
    "release blog": ("no-such-tunnel", "not-allowed", "no-such-tunnel", "not-allowed"),
    "watch": ("ok", "ok", "ok", "not-allowed"),
    "visitTunnel shell@AAECAwQFBgcICQoLDA0ODxAREhM": ("usage", "not-allowed", "usage", "not-allowed"),  # over HTTP
    "inviteVisitor shell@AAECAwQFBgcICQoLDA0ODxAREhM x 9": (
        "no-such-tunnel",
        "not-allowed",
        "no-such-tunnel",
        "not-allowed",
    ),
    "status": ("not-allowed", "ok", "ok", "not-allowed"),
    "settings": ("not-allowed", "ok", "ok", "not-allowed"),
    "penalties": ("not-allowed", "ok", "ok", "not-allowed"),
    "pardon 192.0.2.7": ("not-allowed", "not-allowed", "ok", "not-allowed"),
    "ban 192.0.2.7 60": ("not-allowed", "not-allowed", "ok", "not-allowed"),
    "unban 192.0.2.9": ("not-allowed", "not-allowed", "usage", "not-allowed"),  # it is not banned
    "bans": ("not-allowed", "ok", "ok", "not-allowed"),
    "credentials": ("not-allowed", "ok", "ok", "not-allowed"),
    "certificates": ("not-allowed", "ok", "ok", "not-allowed"),
    "renew blog.example.org": ("not-allowed", "not-allowed", "usage", "not-allowed"),  # [acme] is not enabled
    "tryCertificate blog.example.org": ("not-allowed", "not-allowed", "usage", "not-allowed"),
    "reload": ("not-allowed", "not-allowed", "ok", "not-allowed"),
    "restart": ("not-allowed", "not-allowed", "ok", "not-allowed"),
    "shutdown": ("not-allowed", "not-allowed", "ok", "not-allowed"),
    "help": ("ok", "ok", "ok", "ok"),
    "quit": ("ok", "ok", "ok", "ok"),
    "auth x": ("usage", "usage", "usage", "usage"),  # ControlSession handles it itself
}


def test_the_tables_have_every_verb() -> None:
    assert {line.split()[0].lower() for line in [*ABOUT_A_TUNNEL, *ABOUT_ALL]} == set(COMMANDS)


@pytest.mark.parametrize(("line", "expected"), ABOUT_A_TUNNEL.items())
async def test_verbs_about_a_tunnel(relay: TwoTunnels, line: str, expected: tuple[str, ...]) -> None:
    assert await relay.outcome(None, line.format(relay.of_alice)) == expected[4]
    assert await relay.outcome(ALICE, line.format(relay.of_bob)) == expected[1]
    assert await relay.outcome(ALICE, line.format(relay.of_alice)) == expected[0]
    assert await relay.outcome(EYE, line.format(relay.of_bob)) == expected[2]
    assert await relay.outcome(ROOT, line.format(relay.of_bob)) == expected[3]


@pytest.mark.parametrize(("line", "expected"), ABOUT_ALL.items())
@pytest.mark.parametrize("role", GRANTS)
async def test_verbs_about_all(relay: TwoTunnels, line: str, expected: tuple[str, ...], role: str) -> None:
    assert await relay.outcome(GRANTS[role], line) == expected[list(GRANTS).index(role)]


@pytest.mark.parametrize("verb", ["show", "close", "getTunnelAddress"])
async def test_a_tunnel_of_another_credential_looks_like_a_missing_one(relay: TwoTunnels, verb: str) -> None:
    messages = []
    for reference in (relay.of_bob, relay.of_bob.replace("127.0.0.1", "127.0.0.9")):
        with pytest.raises(NoSuchTunnelError) as caught:
            await relay.request(ALICE, f"{verb} {reference}")
        messages.append(str(caught.value).replace("127.0.0.9", "127.0.0.1"))
    assert messages[0] == messages[1]


async def test_it_is_also_hidden_by_id_and_client_uri(relay: TwoTunnels) -> None:
    assert await relay.outcome(ALICE, "show t2") == "no-such-tunnel"
    client = await relay.daemon.service.get_tunnel_address(relay.of_bob)
    assert await relay.outcome(ALICE, f"show {client}") == "no-such-tunnel"


async def test_list_shows_the_tunnels_of_the_credential(relay: TwoTunnels) -> None:
    lists = {grant.name: (await relay.request(grant, "list")).items for grant in (ALICE, BOB, ROOT, EVERYBODY)}
    assert {name: [item["id"] for item in items] for name, items in lists.items()} == {
        "alice": ["t1"],
        "bob": ["t2"],
        "root": ["t1", "t2"],
        "": ["t1", "t2"],
    }
    assert lists["alice"][0]["owner"] == "alice@127.0.0.1:9"


async def test_a_common_prefix_of_names_grants_nothing(relay: TwoTunnels) -> None:
    assert not (await relay.request(Grant("ali"), "list")).items
    assert not (await relay.request(Grant(""), "list")).items


async def events_of(stream: AsyncGenerator[Sequence[Item], None], count: int) -> list[tuple[object, object]]:
    async with aclosing(stream):
        found: list[Item] = []
        while len(found) < count:
            found += await anext(stream)
        return [(event["event"], event.get("id")) for event in found]


async def test_watch_reports_the_tunnels_of_the_credential(relay: TwoTunnels, nursery: trio.Nursery) -> None:
    streams = {grant.name: (await relay.request(grant, "watch")).stream for grant in (ALICE, ROOT)}
    first = {}
    for name, stream in streams.items():
        assert stream is not None
        first[name] = (await anext(stream))[0]["event"]
    await relay.request(BOB, f"close {relay.of_bob}")
    await relay.request(ALICE, "openTunnel")
    await relay.request(ALICE, f"close {relay.of_alice}")
    alice, root = streams["alice"], streams["root"]
    assert alice is not None
    assert root is not None
    of_alice = [("opened", "t3"), ("request", "t1"), ("closed", "t1")]
    assert await events_of(alice, 3) == of_alice
    assert await events_of(root, 5) == [("request", "t2"), ("closed", "t2"), *of_alice]


@pytest.mark.parametrize("about", ["", " {}"])
async def test_watch_stops_after_its_credential_is_revoked_or_restricted(relay: TwoTunnels, about: str) -> None:
    now: list[Grant | None] = [ROOT]
    caller = Requester("127.0.0.1", "root@127.0.0.1:9", "127.0.0.1", ROOT, lambda: now[0])
    request = parse_request(f"watch{about.format(relay.of_bob)}".encode())
    stream = (await executor(relay.daemon)(request, caller)).stream
    assert stream is not None
    assert (await anext(stream))[0]["event"] == "watching"
    now[0] = Grant("root")  # no longer an admin
    relay.daemon.service.events.refresh()
    async with await trio.open_tcp_stream("127.0.0.1", (await relay.daemon.service.find(relay.of_bob)).server.port):
        await trio.testing.wait_all_tasks_blocked()  # "attached" is not reported
        now[0] = ROOT
        relay.daemon.service.events.refresh()
        await relay.request(BOB, f"close {relay.of_bob}")
    assert [event["event"] for event in await anext(stream)] == ["request", "closed"]
    now[0] = None
    relay.daemon.service.events.refresh()
    await relay.request(ALICE, f"close {relay.of_alice}")
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_credential_has_a_maximum_of_watches_and_not_one_more(relay: TwoTunnels) -> None:
    limit = relay.daemon.settings.control.max_watchers
    streams = [(await relay.request(ALICE, "watch")).stream for _ in range(limit + 1)]  # asked for at the same time
    for stream in streams[:-1]:
        assert stream is not None
        await anext(stream)
    last = streams[-1]
    assert last is not None
    with pytest.raises(LimitReachedError, match="credential 'alice' has 16 of 16 open"):
        await anext(last)
    with pytest.raises(LimitReachedError, match=r"watch limit reached.*\(control.max_watchers\)"):
        await relay.request(ALICE, "watch")
    of_bob, first = (await relay.request(BOB, "watch")).stream, streams[0]
    assert of_bob is not None
    await anext(of_bob)
    assert first is not None
    await first.aclose()
    await relay.request(ALICE, "watch")
    for stream in (*streams, of_bob):
        assert stream is not None
        await stream.aclose()


async def test_watchers_of_a_credential_cost_other_tunnels_nothing(
    relay: TwoTunnels, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def renew() -> Grant:
        asked.append("grant")
        return ALICE

    caller = Requester("127.0.0.1", "alice@127.0.0.1:9", "127.0.0.1", ALICE, renew)
    stream = (await executor(relay.daemon)(parse_request(b"watch"), caller)).stream
    assert stream is not None
    await anext(stream)
    offered: list[object] = []
    monkeypatch.setattr(Watcher, "offer", lambda _watcher, event: offered.append(event["id"]))
    before = len(asked)
    for _ in range(10):
        relay.daemon.service.events.publish("visitor", id="t2")
        relay.daemon.service.events.publish("visitor", id="t1")
    assert (offered, len(asked)) == (["t1"] * 10, before)
    await stream.aclose()


async def test_an_event_is_formatted_once_for_all_watchers(relay: TwoTunnels, monkeypatch: pytest.MonkeyPatch) -> None:
    formatted: list[Item] = []

    def format_one(item: Item) -> bytes:
        formatted.append(item)
        return b"* line\n"

    monkeypatch.setattr(events, "format_item", format_one)
    lines = []
    async with relay.daemon.service.events.watch(10) as one, relay.daemon.service.events.watch(10) as other:
        relay.daemon.service.events.publish("visitor", id=relay.of_bob)
        for watcher in (one, other):
            (event,) = await anext(watcher)
            assert isinstance(event, Event)
            lines.append(event.line)
    assert (lines, len(formatted)) == ([b"* line\n"] * 2, 1)


# Limits of a grant, in the service


async def test_max_tunnels_holds_for_parallel_requests(relay: TwoTunnels) -> None:
    carol = Grant("carol", max_tunnels=2)
    results: list[str] = []

    async def open_one() -> None:
        results.append(await relay.outcome(carol, "openTunnel"))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(open_one)
    assert sorted(results) == ["limit", "limit", "ok", "ok"]
    with pytest.raises(LimitReachedError):
        await relay.request(carol, "openTunnel")
    own = (await relay.request(carol, "list")).items[0]["id"]
    await relay.request(carol, f"close {own}")
    assert await relay.outcome(carol, "openTunnel") == "ok"


async def test_a_tunnel_that_failed_to_open_does_not_count(relay: TwoTunnels) -> None:
    carol = Grant("carol", max_tunnels=1)
    with pytest.raises(UsageError):
        await relay.request(carol, "openTunnel egtp")
    assert await relay.outcome(carol, "openTunnel") == "ok"


@pytest.mark.parametrize(("granted", "configured", "holds"), [(2, 3, 2), (3, 2, 2), (None, 3, 3)])
async def test_the_lower_max_visitors_applies(
    service: TunnelService, tunnel_settings: TunnelSettings, granted: int | None, configured: int, holds: int
) -> None:
    service.settings = lambda: Settings(tunnels=tunnel_settings.model_copy(update={"max_visitors": configured}))
    relay = TwoTunnels(FakeDaemon(Settings(), service), "", "")
    await relay.request(Grant("carol", max_visitors=granted), "openTunnel")
    assert service.tunnels()[0].limits.max_visitors == holds


async def test_max_ttl_is_the_ttl_of_the_tunnel(relay: TwoTunnels) -> None:
    await relay.request(Grant("carol", max_ttl=60.0), "openTunnel")
    assert relay.daemon.service.tunnels()[-1].spec.options.ttl == 60.0


async def test_a_refused_request_opens_nothing(relay: TwoTunnels) -> None:
    with pytest.raises(NotAllowedError):
        await relay.request(Grant("carol", backends=("webmux",)), "openTunnel")
    assert len(relay.daemon.service.tunnels()) == 2


async def test_tunnels_of_a_removed_credential_drain(relay: TwoTunnels) -> None:
    await relay.request(EVERYBODY, "openTunnel")
    relay.daemon.service.drain_revoked({"bob"})
    await trio.testing.wait_all_tasks_blocked()
    assert [item["id"] for item in (await relay.request(ROOT, "list")).items] == ["t2", "t3"]


async def test_a_tunnel_is_described_on_request_when_it_is_opened(relay: TwoTunnels) -> None:
    reply = await relay.request(ALICE, "openTunnel tcp described")
    (item,) = reply.items
    shown = (await relay.request(ALICE, f"show {reply.text}")).items[0]
    assert set(item) == {"id", "client"}
    assert all(item[key] == shown[key] for key in item)
    assert await relay.outcome(ALICE, "openTunnel tcp detailed") == "usage"


@pytest.mark.parametrize(
    ("options", "url"),
    [("scheme=http", "http://{}/"), ("scheme=HTTPS", "https://{}/"), ("scheme=http port_count=2", None), ("", None)],
)
async def test_a_tunnel_has_a_url_where_its_agent_has_said_what_visitors_speak(
    relay: TwoTunnels, options: str, url: str | None
) -> None:
    uri = (await relay.request(ALICE, f"openTunnel tcp {options}")).text
    item = (await relay.request(ALICE, f"show {uri}")).items[0]
    authority = str(item["client"]).removeprefix("tcp://")
    assert item["url"] == (url and url.format(authority))
    if url:  # and by this it is found
        assert (await relay.request(ALICE, f"show {item['url']}")).items[0]["id"] == item["id"]
