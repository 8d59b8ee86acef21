"""Host names of tunnels: who may have which, random ones, reserved ones, and finding a tunnel by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.host_names import DOMAIN, NamedRelay, start_named_relay
from tests.support.name_server import NameServer, serving_names
from tunneld.engine.engine import Engine
from tunneld.errors import LimitReachedError, NoSuchTunnelError, NotAllowedError, UsageError
from tunneld.net.address import HostName
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.policy.names import proof_text
from tunneld.sites.names import RANDOM_LENGTH
from tunneld.sites.proofs import DomainProofs
from tunneld.tunnel.tunnel import Phase

ALICE, BOB, ROOT = Grant("alice"), Grant("bob"), Grant("root", Role.ADMIN)
BLOG = f"blog.{DOMAIN}"
WEEK = 7 * 24 * 3600.0


@pytest.fixture
async def relay(nursery: trio.Nursery, engine: Engine) -> NamedRelay:
    return await start_named_relay(nursery, engine)


# Which names


async def test_a_label_is_completed_and_the_whole_name_is_the_same(relay: NamedRelay) -> None:
    first = await relay.open(ALICE, host="Blog")
    assert (first.addresses, str(first.client_uri)) == ((HostName(BLOG),), f"http://{BLOG}/")
    await relay.service.close(first.id)
    assert (await relay.open(ALICE, host=f"{BLOG}.")).addresses == first.addresses


async def test_several_names_and_paths(relay: NamedRelay) -> None:
    tunnel = await relay.open(ALICE, host="shop,blog/api")
    assert [str(name) for name in tunnel.addresses] == [f"shop.{DOMAIN}", f"{BLOG}/api"]
    assert str((await relay.open(ALICE, host="blog")).client_uri) == f"http://{BLOG}/"
    with pytest.raises(UsageError, match=r"host name blog.* is given twice"):
        await relay.open(ALICE, host=f"blog,{BLOG}")


@pytest.mark.parametrize("host", ["www", "postmaster", "shop.example.com", "*", "a.b.t.example.org", "xn--bcher-kva"])
async def test_names_that_only_an_operator_can_grant(relay: NamedRelay, host: str) -> None:
    with pytest.raises(NotAllowedError, match=r"credential 'alice' may not use the host name .*; ask the operator"):
        await relay.open(ALICE, host=host)
    granted = Grant("carol", names=(host, f"{host}.{DOMAIN}"))
    assert (await relay.open(granted, host=host)).addresses


async def test_a_credential_with_patterns_has_names_that_match_and_random_ones(relay: NamedRelay) -> None:
    alice = Grant("alice", names=("alice-*", "shop.example.com"))
    await relay.open(alice, host="alice-1,shop.example.com")
    await relay.open(alice, host="any")
    with pytest.raises(NotAllowedError, match=r"only alice-\*, shop.example.com"):
        await relay.open(alice, host="blog")


async def test_https_is_advertised_for_a_name_with_a_certificate(relay: NamedRelay) -> None:
    relay.certified.add(BLOG)
    assert str((await relay.open(host="blog")).client_uri) == f"https://{BLOG}/"
    assert str((await relay.open(host="shop")).client_uri) == f"http://shop.{DOMAIN}/"


async def test_a_certificate_is_wanted_where_tls_ends_at_the_relay(relay: NamedRelay) -> None:
    """Not for a path of a name whose TLS is passed on, such as that of challenges which the server itself answers."""
    wanted: list[str] = []
    relay.names.on_taken = lambda name, _owner: wanted.append(str(name))
    relay.names.on_freed = lambda name, _owner: wanted.remove(str(name))
    await relay.open(host="blog", tls="pass")
    challenges = await relay.open(host="blog/.well-known/acme-challenge", plain_http="allow")
    shop = await relay.open(host="shop,shop/api")
    assert wanted == [f"shop.{DOMAIN}", f"shop.{DOMAIN}/api"]
    for tunnel in (challenges, shop):
        await relay.service.close(tunnel.id)
        while tunnel.phase is not Phase.CLOSED:
            await trio.lowlevel.checkpoint()
    assert wanted == []


async def test_a_relay_without_ports_or_without_a_domain_says_so(relay: NamedRelay) -> None:
    relay.settings = relay.settings.model_copy(update={"names": relay.settings.names.model_copy(update={"domain": ""})})
    for host in ("blog", "any"):
        with pytest.raises(UsageError, match="this relay has no domain"):
            await relay.open(host=host)
    relay.names.set_port("http", 0)
    relay.names.set_port("https", 0)
    with pytest.raises(UsageError, match=r"this relay has no host names, .*; leave host out"):
        await relay.open(host="blog")


async def test_another_domain_applies_to_new_tunnels(relay: NamedRelay) -> None:
    first = await relay.open(name="web", host="blog")
    names = relay.settings.names.model_copy(update={"domain": "u.example.org"})
    relay.settings = relay.settings.model_copy(update={"names": names})
    assert relay.names.sites.has_host(BLOG)
    assert str((await relay.open(host="blog")).client_uri) == "http://blog.u.example.org/"
    assert first.addresses == (HostName(BLOG),)


# Random names


def random_label(relay_name: object) -> str:
    name = str(relay_name)
    assert name.endswith(f".{DOMAIN}")
    return name.removesuffix(f".{DOMAIN}")


async def test_a_random_name_is_another_one_for_each_tunnel(relay: NamedRelay) -> None:
    labels = {random_label((await relay.open(host="any")).addresses[0]) for _ in range(5)}
    assert len(labels) == 5
    assert {len(label) for label in labels} == {RANDOM_LENGTH}


async def test_a_random_name_stays_with_the_name_of_the_tunnel(relay: NamedRelay) -> None:
    first = await relay.open(ALICE, name="web", host="any,any")
    assert len(set(first.addresses)) == 2
    again = await relay.open(ALICE, name="web", host="any,any")
    assert again.addresses == first.addresses
    await relay.service.close(again.id, keep=True)
    assert (await relay.open(ALICE, name="web", host="any,any")).addresses == first.addresses
    assert (await relay.open(BOB, name="web", host="any")).addresses != first.addresses


async def test_a_chosen_name_is_no_random_one_later(relay: NamedRelay) -> None:
    """It may no longer be the holder's: the grant has changed."""
    await relay.open(ALICE, name="web", host="blog")
    limited = Grant("alice", names=("alice-*",))
    assert (await relay.open(limited, name="web", host="any")).addresses != (HostName(BLOG),)


async def test_names_survive_a_restart(nursery: trio.Nursery, engine: Engine, tmp_path: Path) -> None:
    async with trio.open_nursery() as inner:
        relay = await start_named_relay(inner, engine, tmp_path)
        first = await relay.open(name="web", host="any")
        await relay.open(name="blog", host="blog")
        await relay.service.reservations.saved()
        inner.cancel_scope.cancel()
    relay = await start_named_relay(nursery, engine, tmp_path)
    with pytest.raises(LimitReachedError, match=r"host name blog\..* is reserved for .*, now closed"):
        await relay.open(address="192.0.2.9", host="blog")
    assert (await relay.get(BLOG))[0] == 503
    assert (await relay.open(name="web", host="any")).addresses == first.addresses


# Owners


async def test_a_name_in_use_is_refused_for_all_others(relay: NamedRelay) -> None:
    await relay.open(ALICE, host="blog")
    for grant, reason in ((ALICE, "is in use by another tunnel"), (BOB, "belongs to another credential")):
        with pytest.raises(LimitReachedError, match=rf"host name blog\..* {reason}"):
            await relay.open(grant, host="blog")


@pytest.mark.parametrize(("first", "second"), [("blog", "blog/api"), ("blog/api", "blog"), ("blog/api", "blog/other")])
async def test_a_name_belongs_to_one_credential_with_all_its_paths(relay: NamedRelay, first: str, second: str) -> None:
    """With a path, another credential would get cookies of the host, and answer challenges for a certificate."""
    tunnel = await relay.open(ALICE, host=first, name="web")
    with pytest.raises(LimitReachedError, match=r"host name blog\..* belongs to another credential"):
        await relay.open(BOB, host=second)
    await relay.service.close(tunnel.id, keep=True)
    with pytest.raises(LimitReachedError, match=r"host name blog\..* belongs to another credential"):
        await relay.open(BOB, host=second)
    other = await relay.open(ALICE, host=second)
    await relay.service.reservations.release(str(tunnel.addresses[0]), ALICE)
    with pytest.raises(LimitReachedError, match=r"host name blog\..* belongs to another credential"):
        await relay.open(BOB, host=first)
    await relay.service.close(other.id)
    await relay.open(BOB, host=second)


async def test_a_name_is_reserved_for_its_owner_until_it_is_released(relay: NamedRelay) -> None:
    first = await relay.open(ALICE, name="web", host="blog")
    await relay.service.close(first.id, keep=True)
    for name in ({}, {"name": "web"}):
        with pytest.raises(LimitReachedError, match=r"is reserved for another tunnel, now closed"):
            await relay.open(BOB, host="blog", **name)
    with pytest.raises(LimitReachedError, match=rf"reserved for tunnel 'web' of alice, .*; release {BLOG} frees it"):
        await relay.open(ROOT, host="blog")
    assert (await relay.get(BLOG))[0] == 503
    assert str((await relay.service.reservations.release(BLOG, ALICE)).addresses[0]) == BLOG
    assert (await relay.get(BLOG))[0] == 404
    assert (await relay.open(BOB, host="blog")).addresses == first.addresses


async def test_a_reservation_of_a_name_ends(relay: NamedRelay, mock_clock: MockClock) -> None:
    first = await relay.open(ALICE, name="web", host="blog")
    await relay.service.close(first.id, keep=True)
    mock_clock.jump(WEEK)
    await relay.open(BOB, host="blog")


async def test_an_owner_has_a_limited_number_of_names_open_and_reserved(nursery: trio.Nursery, engine: Engine) -> None:
    relay = await start_named_relay(nursery, engine, max_names_per_owner=3)
    await relay.open(ALICE, host="a")
    kept = await relay.open(ALICE, name="web", host="b,c")
    await relay.service.close(kept.id, keep=True)
    with pytest.raises(LimitReachedError, match=r"limit of host names reached: 3 of 3 are open or reserved"):
        await relay.open(ALICE, host="d")
    await relay.open(BOB, host="d")
    await relay.open(ALICE, name="web", host="b,c")  # its own again
    with pytest.raises(LimitReachedError, match="max_names_per_owner"):
        await relay.open(ALICE, name="web", host="b,c,e")


async def test_the_relay_has_a_limited_number_of_names(nursery: trio.Nursery, engine: Engine) -> None:
    relay = await start_named_relay(nursery, engine, max_names=2)
    await relay.open(ALICE, host="a,b")
    with pytest.raises(LimitReachedError, match=r"names\.max_names"):
        await relay.open(BOB, host="c")
    assert [str(name) for name, _ in relay.names.sites] == [f"a.{DOMAIN}", f"b.{DOMAIN}"]


async def test_agents_that_share_a_tunnel_agree_on_its_name(relay: NamedRelay) -> None:
    first = await relay.open(ALICE, name="web", share="yes", host="blog")
    assert await relay.open(ALICE, name="web", share="yes", host=BLOG) is first
    assert await relay.open(ALICE, name="web", share="yes") is first
    with pytest.raises(UsageError, match="host=shop"):
        await relay.open(ALICE, name="web", share="yes", host="shop")
    by_chance = await relay.open(ALICE, name="other", share="yes", host="any")
    assert await relay.open(ALICE, name="other", share="yes", host="any") is by_chance


# Finding


async def test_a_tunnel_is_found_by_its_names_and_its_public_address(relay: NamedRelay) -> None:
    port = (await relay.open(ALICE)).client_uri.port
    await relay.service.close("t1")
    tunnel = await relay.open(ALICE, host="blog,shop/api", client_port=str(port))
    for reference in (BLOG, BLOG.upper(), f"shop.{DOMAIN}/api", f"http://{BLOG}/", f"http://{BLOG}", str(port)):
        assert (await relay.service.find(reference, EVERYBODY)).id == tunnel.id, reference
    for reference in ("blog", f"shop.{DOMAIN}", f"x.{BLOG}", "..", f"http://shop.{DOMAIN}/other"):
        with pytest.raises(NoSuchTunnelError):
            await relay.service.find(reference, EVERYBODY)
    with pytest.raises(NoSuchTunnelError):
        await relay.service.find(BLOG, BOB)


# Names of domains of the user's own

SHOP = "shop.example.com"
RECORD = f"_tunneld.{SHOP}."


@pytest.fixture
def dns() -> Iterator[NameServer]:
    with serving_names() as server:
        yield server


async def proving_relay(
    nursery: trio.Nursery, engine: Engine, dns: NameServer, state: Path | None = None
) -> NamedRelay:
    resolver = f"127.0.0.1:{dns.port}"
    return await start_named_relay(nursery, engine, state, custom_domains=True, resolver=resolver)


async def test_a_custom_domain_is_for_the_credential_in_its_record(
    nursery: trio.Nursery, engine: Engine, dns: NameServer
) -> None:
    relay = await proving_relay(nursery, engine, dns)
    with pytest.raises(NotAllowedError) as refused:
        await relay.open(ALICE, host=SHOP)
    text = proof_text(DOMAIN, "alice")
    assert str(refused.value) == (
        f"credential 'alice' may not use the host name {SHOP} before its owner permits that: set the DNS record "
        f'{RECORD} TXT "{text}" (the name has no such record) and try again'
    )
    for number, (grant, name) in enumerate(((ALICE, "a"), (BOB, "b"))):  # each name is looked up anew
        host = f"{name}.example.com"
        dns.records.add((f"_tunneld.{host}.", text))
        if number == 0:
            assert (await relay.open(grant, host=f"{host},blog")).addresses == (HostName(host), HostName(BLOG))
        else:
            with pytest.raises(NotAllowedError, match="has other TXT records only"):
                await relay.open(grant, host=host)


async def test_there_are_names_for_which_no_record_is_looked_up(
    nursery: trio.Nursery, engine: Engine, dns: NameServer
) -> None:
    relay = await proving_relay(nursery, engine, dns)
    listed = Grant("alice", names=("blog", "listed.example.com"))
    await relay.open(ALICE, host="mine")
    await relay.open(listed, host="listed.example.com")
    for grant, host in ((listed, SHOP), (EVERYBODY, SHOP), (ALICE, DOMAIN), (ALICE, f"a.b.{DOMAIN}"), (ALICE, "www")):
        with pytest.raises(NotAllowedError):
            await relay.open(grant, host=host)
    assert not dns.asked


async def test_a_dns_server_that_fails_keeps_out_new_names_only(
    nursery: trio.Nursery, engine: Engine, dns: NameServer, tmp_path: Path
) -> None:
    relay = await proving_relay(nursery, engine, dns, tmp_path)
    relay.names.proofs = DomainProofs(lambda: relay.settings.names.model_copy(update={"custom_domains_cache": 1e-9}))
    dns.records.add((RECORD, proof_text(DOMAIN, "alice")))
    tunnel = await relay.open(ALICE, host=SHOP, name="shop")
    await relay.service.close(tunnel.id, keep=True)
    dns.refuses = True
    again = await relay.open(ALICE, host=SHOP, name="shop")
    assert again.addresses == (HostName(SHOP),)
    with pytest.raises(LimitReachedError, match=r"could not look up _tunneld\.other\.example\.com: .*try again later"):
        await relay.open(ALICE, host="other.example.com", name="other")
    await relay.service.close(again.id, keep=True)
    dns.refuses = False
    dns.records.clear()
    with pytest.raises(NotAllowedError, match="no such record"):
        await relay.open(ALICE, host=SHOP, name="shop")
