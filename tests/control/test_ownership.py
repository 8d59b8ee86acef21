"""Whose tunnel it is: every verb, by every role, about one's own tunnels and those of others."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import pytest
import trio

from tests.http.support import Relay
from tunneld.config.schema import Settings, TunnelSettings
from tunneld.control.commands import COMMANDS, executor
from tunneld.control.reply import Caller, Reply
from tunneld.directory.service import TunnelService
from tunneld.errors import LimitReachedError, NoSuchTunnelError, NotAllowedError, TunneldError, UsageError
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.wire.lines import Item, parse_request

ALICE, BOB, ROOT = Grant("alice"), Grant("bob"), Grant("root", Role.ADMIN)
WHO: dict[str, Grant | None] = {"user": ALICE, "admin": ROOT, "stranger": None}


@dataclass
class House:
    """A relay with two tunnels: alice's and bob's."""

    relay: Relay
    alices: str
    bobs: str

    async def ask(self, grant: Grant | None, line: str) -> Reply:
        owner = f"{grant.name}@127.0.0.1:9" if grant else "127.0.0.1:9"
        caller = Caller("127.0.0.1", owner, "127.0.0.1", grant)
        return await executor(self.relay)(parse_request(line.encode()), caller)

    async def outcome(self, grant: Grant | None, line: str) -> str:
        """The code of the refusal, or ok."""
        try:
            reply = await self.ask(grant, line)
        except TunneldError as error:
            return error.code
        if reply.stream:
            await reply.stream.aclose()
        return "ok"


@pytest.fixture
async def house(service: TunnelService) -> House:
    house = House(Relay(Settings(tunnels=TunnelSettings(ports="0")), service), "", "")
    house.alices = (await house.ask(ALICE, "openTunnel")).text
    house.bobs = (await house.ask(BOB, "openTunnel")).text
    return house


#                        user, own    user, other's     admin   stranger
ABOUT_A_TUNNEL = {
    "getTunnelAddress {}": ("ok", "no-such-tunnel", "ok", "not-allowed"),
    "show {}": ("ok", "no-such-tunnel", "ok", "not-allowed"),
    "watch {}": ("ok", "no-such-tunnel", "ok", "not-allowed"),
    "trim {} 0": ("ok", "no-such-tunnel", "ok", "not-allowed"),
    "drain {}": ("ok", "no-such-tunnel", "ok", "not-allowed"),
    "join {}": ("ok", "no-such-tunnel", "ok", "not-allowed"),
    "leave {}": ("ok", "no-such-tunnel", "ok", "not-allowed"),
    "close {}": ("ok", "no-such-tunnel", "ok", "not-allowed"),
}
#              user   admin   stranger
ABOUT_ALL = {
    "openTunnel": ("ok", "ok", "not-allowed"),
    "list": ("ok", "ok", "not-allowed"),
    "reservations": ("ok", "ok", "not-allowed"),
    "release blog": ("no-such-tunnel", "no-such-tunnel", "not-allowed"),
    "watch": ("ok", "ok", "not-allowed"),
    "status": ("not-allowed", "ok", "not-allowed"),
    "settings": ("not-allowed", "ok", "not-allowed"),
    "reload": ("not-allowed", "ok", "not-allowed"),
    "restart": ("not-allowed", "ok", "not-allowed"),
    "shutdown": ("not-allowed", "ok", "not-allowed"),
    "help": ("ok", "ok", "ok"),
    "quit": ("ok", "ok", "ok"),
    "auth x": ("usage", "usage", "usage"),  # the line face keeps it for itself
}


def test_the_tables_have_every_verb() -> None:
    assert {line.split()[0].lower() for line in [*ABOUT_A_TUNNEL, *ABOUT_ALL]} == set(COMMANDS)


@pytest.mark.parametrize(("line", "expected"), ABOUT_A_TUNNEL.items())
async def test_verbs_about_a_tunnel(house: House, line: str, expected: tuple[str, ...]) -> None:
    assert await house.outcome(None, line.format(house.alices)) == expected[3]
    assert await house.outcome(ALICE, line.format(house.bobs)) == expected[1]
    assert await house.outcome(ALICE, line.format(house.alices)) == expected[0]
    assert await house.outcome(ROOT, line.format(house.bobs)) == expected[2]


@pytest.mark.parametrize(("line", "expected"), ABOUT_ALL.items())
@pytest.mark.parametrize("who", WHO)
async def test_verbs_about_all(house: House, line: str, expected: tuple[str, ...], who: str) -> None:
    assert await house.outcome(WHO[who], line) == expected[list(WHO).index(who)]


@pytest.mark.parametrize("verb", ["show", "close", "getTunnelAddress"])
async def test_a_tunnel_of_others_is_as_unknown_as_none(house: House, verb: str) -> None:
    told = []
    for reference in (house.bobs, house.bobs.replace("127.0.0.1", "127.0.0.9")):
        with pytest.raises(NoSuchTunnelError) as caught:
            await house.ask(ALICE, f"{verb} {reference}")
        told.append(str(caught.value).replace("127.0.0.9", "127.0.0.1"))
    assert told[0] == told[1]


async def test_by_id_and_by_client_uri_too(house: House) -> None:
    assert await house.outcome(ALICE, "show t2") == "no-such-tunnel"
    client = house.relay.service.get_tunnel_address(house.bobs)
    assert await house.outcome(ALICE, f"show {client}") == "no-such-tunnel"


async def test_a_list_has_what_one_may_see(house: House) -> None:
    lists = {grant.name: (await house.ask(grant, "list")).items for grant in (ALICE, BOB, ROOT, EVERYBODY)}
    assert {name: [item["id"] for item in items] for name, items in lists.items()} == {
        "alice": ["t1"],
        "bob": ["t2"],
        "root": ["t1", "t2"],
        "": ["t1", "t2"],
    }
    assert lists["alice"][0]["owner"] == "alice@127.0.0.1:9"


async def test_a_name_that_begins_alike_is_another(house: House) -> None:
    assert (await house.ask(Grant("ali"), "list")).items == []
    assert (await house.ask(Grant(""), "list")).items == []


async def events_of(stream: AsyncGenerator[Item, None], count: int) -> list[tuple[object, object]]:
    async with aclosing(stream):
        return [(event["event"], event.get("id")) for event in [await anext(stream) for _ in range(count)]]


async def test_a_watch_tells_of_what_one_may_see(house: House, nursery: trio.Nursery) -> None:
    streams = {grant.name: (await house.ask(grant, "watch")).stream for grant in (ALICE, ROOT)}
    first = {}
    for name, stream in streams.items():
        assert stream is not None
        first[name] = (await anext(stream))["event"]
    await house.ask(BOB, f"close {house.bobs}")
    await house.ask(ALICE, "openTunnel")
    await house.ask(ALICE, f"close {house.alices}")
    alice, root = streams["alice"], streams["root"]
    assert alice is not None
    assert root is not None
    assert await events_of(alice, 2) == [("opened", "t3"), ("closed", "t1")]
    assert await events_of(root, 3) == [("closed", "t2"), ("opened", "t3"), ("closed", "t1")]


@pytest.mark.parametrize("about", ["", " {}"])
async def test_a_watch_tells_nothing_more_once_its_credential_is_gone_or_may_do_less(house: House, about: str) -> None:
    now: list[Grant | None] = [ROOT]
    caller = Caller("127.0.0.1", "root@127.0.0.1:9", "127.0.0.1", ROOT, lambda: now[0])
    request = parse_request(f"watch{about.format(house.bobs)}".encode())
    stream = (await executor(house.relay)(request, caller)).stream
    assert stream is not None
    assert (await anext(stream))["event"] == "watching"
    now[0] = Grant("root")  # no admin any more
    async with await trio.open_tcp_stream("127.0.0.1", house.relay.service.find(house.bobs).server_uri.port):
        await trio.testing.wait_all_tasks_blocked()  # "attached" is not told
        now[0] = ROOT
        await house.ask(BOB, f"close {house.bobs}")
    assert (await anext(stream))["event"] == "closed"
    now[0] = None
    await house.ask(ALICE, f"close {house.alices}")
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


# Limits of a grant, in the service


async def test_as_many_tunnels_as_granted_also_at_once(house: House) -> None:
    carol = Grant("carol", max_tunnels=2)
    results: list[str] = []

    async def open_one() -> None:
        results.append(await house.outcome(carol, "openTunnel"))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(open_one)
    assert sorted(results) == ["limit", "limit", "ok", "ok"]
    with pytest.raises(LimitReachedError):
        await house.ask(carol, "openTunnel")
    mine = (await house.ask(carol, "list")).items[0]["id"]
    await house.ask(carol, f"close {mine}")
    assert await house.outcome(carol, "openTunnel") == "ok"


async def test_a_tunnel_that_could_not_be_opened_does_not_count(house: House) -> None:
    carol = Grant("carol", max_tunnels=1)
    with pytest.raises(UsageError):
        await house.ask(carol, "openTunnel egtp")
    assert await house.outcome(carol, "openTunnel") == "ok"


@pytest.mark.parametrize(("granted", "configured", "holds"), [(2, 3, 2), (3, 2, 2), (None, 3, 3)])
async def test_the_lower_limit_of_visitors_holds(
    service: TunnelService, tunnel_settings: TunnelSettings, granted: int | None, configured: int, holds: int
) -> None:
    service._settings = lambda: Settings(tunnels=tunnel_settings.model_copy(update={"max_visitors": configured}))
    house = House(Relay(Settings(), service), "", "")
    await house.ask(Grant("carol", max_visitors=granted), "openTunnel")
    assert service.tunnels()[0].spec.settings.max_visitors == holds


async def test_the_ttl_of_a_grant_reaches_the_tunnel(house: House) -> None:
    await house.ask(Grant("carol", max_ttl=60.0), "openTunnel")
    assert house.relay.service.tunnels()[-1].spec.options.ttl == 60.0


async def test_what_is_not_granted_is_refused_and_nothing_is_left(house: House) -> None:
    with pytest.raises(NotAllowedError):
        await house.ask(Grant("carol", backends=("webmux",)), "openTunnel")
    assert len(house.relay.service.tunnels()) == 2


async def test_tunnels_of_a_removed_credential_drain(house: House) -> None:
    await house.ask(EVERYBODY, "openTunnel")
    house.relay.service.drain_revoked({"bob"})
    await trio.testing.wait_all_tasks_blocked()
    assert [item["id"] for item in (await house.ask(ROOT, "list")).items] == ["t2", "t3"]
