"""Proofs that a domain is a user's own, with a DNS server on loopback, and with look-ups that are played."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from tests.support.name_server import NameServer, serving_names
from tunneld.net.address import HostName
from tunneld.policy.names import is_custom, proof_record, proof_text
from tunneld.sites.proofs import MAX_LOOKUPS, MISSING_CACHE, DomainProofs, MissingProof, look_up_txt

DOMAIN = "t.example.org"
SHOP = HostName("shop.example.com")
RECORD = "_tunneld.shop.example.com"
TEXT = proof_text(DOMAIN, "alice")


@dataclass
class Settings:
    domain: str = DOMAIN
    custom_domains: bool = True
    custom_domains_cache: float = 60.0
    resolver_address: tuple[str, int] | None = None
    resolver_timeout: float = 5.0


@pytest.fixture
def server() -> Iterator[NameServer]:
    with serving_names() as server:
        yield server


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("shop.example.com", True),
        ("*.shop.example.com", True),
        ("nott.example.org", True),
        ("example.org", True),
        (DOMAIN, False),
        (f"*.{DOMAIN}", False),
        (f"a.b.{DOMAIN}", False),
    ],
)
def test_which_names_are_of_another_domain(name: str, *, is_own: bool) -> None:
    assert is_custom(HostName(name), DOMAIN) is is_own


def test_a_proof_is_for_one_credential_of_one_relay() -> None:
    texts = {proof_text(domain, name) for domain in (DOMAIN, "t.example.net") for name in ("alice", "bob")}
    assert len(texts) == 4
    assert proof_text(DOMAIN, "alice") == "tunneld-domain=dp4t6kc6zkrdofllgi3zlasdffpahra2"  # it is in people's zones
    assert proof_record(HostName("*.shop.example.com")) == proof_record(HostName("shop.example.com", "/a")) == RECORD


async def test_what_the_dns_says(server: NameServer) -> None:
    proofs = DomainProofs(lambda: Settings(resolver_address=("127.0.0.1", server.port), custom_domains_cache=1e-9))
    missing = f'set the DNS record {RECORD}. TXT "{TEXT}" (the name has {{}}) and try again'
    assert await proofs.check(SHOP, "alice") == MissingProof(missing.format("no such record"), is_certain=True)
    server.records = {(f"{RECORD}.", "v=spf1"), (f"{RECORD}.", proof_text(DOMAIN, "bob"))}
    assert await proofs.check(SHOP, "alice") == MissingProof(missing.format("other TXT records only"), is_certain=True)
    assert await proofs.check(SHOP, "bob") is None
    server.records.add((f"{RECORD}.", TEXT))
    assert await proofs.check(SHOP, "alice") is None
    assert await proofs.check(HostName("*.shop.example.com"), "alice") is None
    assert await proofs.check(HostName("other.example.com"), "alice") is not None
    server.refuses = True
    failed = await proofs.check(SHOP, "alice")
    assert failed is not None
    assert (failed.is_certain, "SERVFAIL" in failed.reason) == (False, True)


async def test_a_long_record_comes_in_several_strings(server: NameServer) -> None:
    server.records = {("a.example.", 'one" "two')}
    assert list(await look_up_txt("a.example", ("127.0.0.1", server.port), 5.0)) == ["onetwo"]


async def test_a_server_that_is_silent_is_given_up(server: NameServer) -> None:
    server.is_silent = True
    settings = Settings(resolver_address=("127.0.0.1", server.port), resolver_timeout=0.05)
    failed = await DomainProofs(lambda: settings).check(SHOP, "alice")
    assert failed is not None
    assert not failed.is_certain
    assert server.asked


# What is remembered, and how much is asked


@dataclass
class PlayedDns:
    """Look-ups that take a second each."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def look_up(self, record: str, _server: object, _timeout: float) -> Collection[str]:
        self.asked.append(record)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await trio.sleep(1)
        self.running -= 1
        return self.texts.get(record, ())


async def test_a_record_is_remembered_and_a_missing_one_only_for_a_moment(autojump_clock: MockClock) -> None:
    dns = PlayedDns()
    proofs = DomainProofs(Settings, dns.look_up)
    for _ in range(2):
        assert await proofs.check(SHOP, "alice") is not None
    assert len(dns.asked) == 1
    dns.texts[RECORD] = [TEXT]
    await trio.sleep(MISSING_CACHE)
    assert await proofs.check(SHOP, "alice") is None
    dns.texts.clear()
    await trio.sleep(59)
    assert await proofs.check(SHOP, "alice") is None
    assert len(dns.asked) == 2
    await trio.sleep(2)
    assert await proofs.check(SHOP, "alice") is not None


async def test_look_ups_are_bounded_and_one_credential_has_one(autojump_clock: MockClock) -> None:
    dns = PlayedDns()
    proofs = DomainProofs(Settings, dns.look_up)
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(proofs.check, HostName(f"{number}.example.com"), "alice")
    assert (len(dns.asked), dns.most_running) == (3, 1)
    async with trio.open_nursery() as nursery:
        for number in range(2 * MAX_LOOKUPS):
            nursery.start_soon(proofs.check, HostName(f"{number}.example.net"), f"user {number}")
    assert dns.most_running == MAX_LOOKUPS


@pytest.mark.interpreted
async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    monkeypatch.setattr("tunneld.sites.proofs.MAX_CACHED", 2)
    dns = PlayedDns()
    proofs = DomainProofs(Settings, dns.look_up)
    names = [HostName(f"{number}.example.com") for number in (1, 2, 3)]
    dns.texts = {proof_record(name): [TEXT] for name in names}
    for name in [*names, names[2], names[1], names[0]]:
        assert await proofs.check(name, "alice") is None
    assert len(dns.asked) == 4  # the oldest was forgotten
