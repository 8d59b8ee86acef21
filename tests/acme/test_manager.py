"""Orders and renewals on a virtual clock, with an authority that is played."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from structlog.testing import capture_logs
from trio.testing import MockClock

from tunneld.acme.manager import CertificateManager
from tunneld.acme.state import Issued, account_folder, certificate_folder
from tunneld.config.certificates import AcmeSettings, NamedCertificate
from tunneld.errors import CertificateError, UsageError
from tunneld.tls.store import CertificateStore

CA = trustme.CA()
EPOCH = 1_700_000_000.0
DAY = 86400.0
HOUR = 3600.0
DOMAIN = "t.example.org"


def now() -> float:
    return EPOCH + trio.current_time()


def issue(*names: str, days: float = 90) -> Issued:
    begin = datetime.fromtimestamp(now(), UTC)
    made = CA.issue_cert(*names, not_before=begin, not_after=begin + timedelta(days=days))
    return Issued(b"".join(each.bytes() for each in made.cert_chain_pems), made.private_key_pem.bytes())


@dataclass
class PlayedAuthority:
    """Does what `Orders` does, at once."""

    days: float = 90
    ordered: list[tuple[float, str]] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)
    suggestion: float | None = None

    def obtain(self, name: str, attempt: int) -> Issued:
        self.ordered.append((trio.current_time(), name))
        self.attempts.append(attempt)
        if name in self.failing:
            raise CertificateError(f"could not get a certificate for {name}: no")
        return issue(name, days=self.days)

    def renewal_time(self, file: Path) -> tuple[float | None, float]:
        assert file.exists()
        self.asked.append(trio.current_time())
        return self.suggestion, now() + 6 * HOUR

    def trial(self, name: str, on_step: Callable[[str], None]) -> None:
        on_step("the authority accepted the order")
        self.obtain(name, 0)

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.ordered]


class Relay:
    """A manager, its store and its settings."""

    def __init__(self, state: Path, nursery: trio.Nursery, **settings: Any) -> None:
        self.settings = AcmeSettings(enabled=True, agree=True, **settings)
        self.authority = PlayedAuthority()
        self.domain = DOMAIN
        self.store = CertificateStore(certificate_folder(state))
        self.failed: list[tuple[str, str]] = []
        self.running = self.most_running = 0
        self._nursery = nursery
        self.manager = CertificateManager(
            self.store, lambda: self.settings, state, domain=lambda: self.domain,
            worker=lambda _: self.authority, now=now, in_thread=self.in_thread,
        )  # fmt: skip
        self.manager.on_failed = lambda name, reason: self.failed.append((name, reason))

    async def start(self) -> None:
        self.store.apply(self.store.load({}))
        await self._nursery.start(self.manager.run)

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await trio.sleep(1)  # what an order takes
        try:
            return work()
        finally:
            self.running -= 1

    def want(self, names: Iterable[str], owner: str = "alice") -> None:
        for name in names:
            self.manager.want(name, owner)

    def item(self, name: str) -> Any:
        (found,) = (each for each in self.manager.certificates() if each["names"] == name)
        return found


@pytest.fixture
async def relay(tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock) -> Relay:
    relay = Relay(tmp_path, nursery)
    await relay.start()
    return relay


async def test_a_name_gets_its_certificate_when_the_tunnel_opens_and_keeps_it(
    relay: Relay, autojump_clock: MockClock
) -> None:
    assert relay.store.context_for("a.example.org") is None
    relay.want(["a.example.org"])
    await trio.sleep(2)
    assert relay.store.context_for("a.example.org") is not None
    await trio.sleep(364 * DAY)
    times = [when for when, _ in relay.authority.ordered]
    assert len(times) == 6  # every 60 to 63 days
    assert all(60 * DAY < later - earlier < 64 * DAY for earlier, later in itertools.pairwise(times))
    assert relay.failed == []


async def test_short_certificates_are_renewed_at_half_of_their_life(relay: Relay, autojump_clock: MockClock) -> None:
    relay.authority.days = 6
    relay.want(["a.example.org"])
    await trio.sleep(30 * DAY)
    times = [when for when, _ in relay.authority.ordered]
    assert all(3 * DAY < later - earlier < 3.4 * DAY for earlier, later in itertools.pairwise(times))
    assert len(times) >= 9


async def test_the_authority_may_ask_for_an_early_renewal(relay: Relay, autojump_clock: MockClock) -> None:
    relay.want(["a.example.org"])
    await trio.sleep(5 * HOUR)
    assert relay.authority.asked == []
    relay.authority.suggestion = EPOCH + 8 * HOUR
    await trio.sleep(2 * HOUR)
    assert len(relay.authority.asked) == 1
    await trio.sleep(1.5 * HOUR)
    assert len(relay.authority.ordered) == 2


async def test_an_authority_that_always_asks_for_renewal_is_obeyed_four_times_a_day(
    relay: Relay, autojump_clock: MockClock
) -> None:
    relay.authority.suggestion = 0.0
    relay.want(["a.example.org"])
    await trio.sleep(DAY)
    assert 4 <= len(relay.authority.ordered) <= 5


async def test_a_closed_tunnel_is_not_renewed_and_its_certificate_is_used_when_it_opens_again(
    relay: Relay, autojump_clock: MockClock
) -> None:
    relay.want(["a.example.org", "a.example.org"])  # two tunnels, by path
    await trio.sleep(DAY)
    relay.manager.unwant("a.example.org")
    await trio.sleep(70 * DAY)
    assert len(relay.authority.ordered) == 2
    relay.manager.unwant("a.example.org")
    await trio.sleep(60 * DAY)
    assert len(relay.authority.ordered) == 2
    assert relay.store.expiring(now()) == []  # nobody needs it
    await trio.sleep(20 * DAY)
    relay.want(["a.example.org"])
    await trio.sleep(2)
    assert len(relay.authority.ordered) == 3
    relay.manager.unwant("a.example.org")
    await trio.sleep(90 * DAY)
    assert len(relay.store.stored()) == 1
    await trio.sleep(9 * DAY)  # expired a week ago
    assert relay.store.stored() == []
    relay.manager.unwant("unknown.example.org")


async def test_failures_are_tried_again_ever_less_often_and_logged_once_a_day(
    relay: Relay, autojump_clock: MockClock
) -> None:
    relay.authority.failing.add("a.example.org")
    with capture_logs() as logs:
        relay.want(["a.example.org"])
        await trio.sleep(3 * DAY)
    times = [when for when, _ in relay.authority.ordered]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[:4] == pytest.approx([301, 601, 1201, 2401], abs=3)
    assert max(pauses) <= DAY + 5
    assert relay.authority.attempts == list(range(len(times)))  # another challenge each time
    assert relay.failed == [("a.example.org", "could not get a certificate for a.example.org: no")] * len(times)
    assert 2 <= len([line for line in logs if line["event"] == "no certificate"]) <= 4
    (problem,) = relay.manager.problems()
    assert problem == "no certificate for a.example.org: could not get a certificate for a.example.org: no"
    assert relay.manager.failure("a.example.org").endswith(": no")
    relay.authority.failing.clear()
    await trio.sleep(DAY)
    assert relay.manager.problems() == []
    assert relay.manager.failure("a.example.org") == ""


async def test_failures_are_remembered_across_a_restart(
    relay: Relay, autojump_clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    relay.authority.failing.add("a.example.org")
    relay.want(["a.example.org"])
    await trio.sleep(30)
    again = Relay(tmp_path, nursery)
    again.want(["a.example.org"])
    await again.start()
    await trio.sleep(200)
    assert again.authority.ordered == []
    await trio.sleep(200)
    assert again.authority.names == ["a.example.org"]
    file = account_folder(tmp_path, again.settings.directory) / "failures.json"
    file.write_text("not JSON")
    third = Relay(tmp_path, nursery)
    third.want(["b.example.org"])
    await third.start()
    await trio.sleep(5)
    assert third.authority.names == ["b.example.org"]


async def test_certificates_are_found_after_a_restart(
    relay: Relay, autojump_clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    relay.want(["a.example.org"])
    await trio.sleep(5)
    again = Relay(tmp_path, nursery)
    await again.start()
    again.want(["a.example.org", "b.example.org"])
    await trio.sleep(DAY)
    assert again.authority.names == ["b.example.org"]
    assert again.item("a.example.org")["source"] == "acme"


async def test_the_wildcard_covers_all_names_under_the_domain(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    relay = Relay(tmp_path, nursery, dns_hook=["hook"])
    relay.want(["early.t.example.org"])
    await relay.start()
    await trio.sleep(3)
    relay.want(["blog.t.example.org", "shop.example.com", "a.b.t.example.org"])
    await trio.sleep(10)
    assert sorted(relay.authority.names) == ["*.t.example.org", "a.b.t.example.org", "shop.example.com"]
    assert relay.store.context_for("early.t.example.org") is not None
    await trio.sleep(65 * DAY)
    assert relay.authority.names.count("*.t.example.org") == 2
    relay.domain = "u.example.org"
    relay.settings = relay.settings.model_copy(update={"contact": "ops@example.org"})
    relay.manager.reconfigure()
    await trio.sleep(5)
    assert relay.authority.names[-1] == "*.u.example.org"
    await trio.sleep(65 * DAY)  # the former wildcard is not renewed, so its names get their own
    assert relay.authority.names.count("*.t.example.org") == 2
    assert "blog.t.example.org" in relay.authority.names


async def test_a_wildcard_that_fails_does_not_make_each_name_order_its_own(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    relay = Relay(tmp_path, nursery, dns_hook=["hook"])
    relay.authority.failing.add("*.t.example.org")
    await relay.start()
    relay.want(f"random{number}.t.example.org" for number in range(100))
    await trio.sleep(HOUR)
    assert set(relay.authority.names) == {"*.t.example.org"}


async def test_a_wildcard_of_a_user_needs_dns(relay: Relay, autojump_clock: MockClock) -> None:
    relay.want(["*.example.com"])
    await trio.sleep(HOUR)
    assert relay.authority.names == []


async def test_a_name_with_a_configured_certificate_is_not_ordered(
    relay: Relay, autojump_clock: MockClock, tmp_path: Path
) -> None:
    made = CA.issue_cert("*.example.com", "example.org")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    made.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    files = NamedCertificate(certificate=tmp_path / "chain.pem", key=tmp_path / "key.pem")
    relay.store.apply(relay.store.load({}, {"certificate[0]": files}))
    relay.manager.reconfigure()
    relay.want(["shop.example.com", "example.org", "a.b.example.com"])
    await trio.sleep(10)
    assert relay.authority.names == ["a.b.example.com"]
    assert relay.item("*.example.com,example.org")["source"] == "file"


async def test_the_limit_of_an_owner(tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    relay = Relay(tmp_path, nursery, max_orders="100/h", max_orders_per_owner="2/week")
    await relay.start()
    with capture_logs() as logs:
        relay.want(["a.example.org", "b.example.org", "c.example.org"])
        relay.want(["d.example.org"], owner="bob")
        await trio.sleep(10)
    assert sorted(relay.authority.names) == ["a.example.org", "b.example.org", "d.example.org"]
    assert relay.failed == [("c.example.org", "limit of orders reached (acme.max_orders_per_owner)")]
    assert [line["owner"] for line in logs if line["event"] == "certificate not ordered"] == ["alice"]
    await trio.sleep(4 * DAY)
    assert "c.example.org" in relay.authority.names
    await trio.sleep(100 * DAY)
    assert len(relay.authority.names) == 8  # renewals do not count


async def test_the_limit_of_the_relay(tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    relay = Relay(tmp_path, nursery, max_orders="20/h")
    await relay.start()
    for number in range(30):
        relay.want([f"{number}.example.org"], owner=f"owner{number}")
    await trio.sleep(60)
    assert len(relay.authority.names) == 20
    await trio.sleep(HOUR)
    assert len(relay.authority.names) == 30


async def test_at_most_so_many_orders_run_at_once(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    relay = Relay(tmp_path, nursery, max_parallel=3, max_orders="1000/h", max_orders_per_owner="1000/h")
    await relay.start()
    relay.want(f"{number}.example.org" for number in range(20))
    await trio.sleep(60)
    assert len(relay.authority.names) == 20
    assert relay.most_running == 3


async def test_renewing_by_hand_ignores_the_limits(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    relay = Relay(tmp_path, nursery, max_orders_per_owner="1/week")
    await relay.start()
    relay.want(["a.example.org", "b.example.org"])
    await trio.sleep(5)
    await relay.manager.renew("b.example.org")
    await relay.manager.renew("a.example.org")
    assert relay.authority.names == ["a.example.org", "b.example.org", "a.example.org"]
    with pytest.raises(UsageError, match=r"no open tunnel has the host name 'c\.example\.org'"):
        await relay.manager.renew("c.example.org")
    relay.authority.failing.add("a.example.org")
    with pytest.raises(CertificateError, match=r": no$"):
        await relay.manager.renew("a.example.org")
    assert relay.store.context_for("a.example.org") is not None  # the former one
    assert relay.manager.problems() == []
    assert relay.item("a.example.org")["failures"] == 1


async def test_a_trial_stores_nothing(relay: Relay, autojump_clock: MockClock) -> None:
    steps: list[str] = []
    await relay.manager.trial("a.example.org", steps.append)
    assert steps == ["the authority accepted the order"]
    assert relay.store.stored() == []


async def test_nothing_is_ordered_while_disabled_and_everything_once_enabled(
    relay: Relay, autojump_clock: MockClock
) -> None:
    enabled = relay.settings
    relay.settings = AcmeSettings()
    relay.manager.reconfigure()
    relay.want(["a.example.org"])
    await trio.sleep(DAY)
    assert relay.authority.names == []
    with pytest.raises(UsageError, match=r"set acme\.enabled"):
        await relay.manager.renew("a.example.org")
    relay.settings = enabled
    relay.manager.reconfigure()
    await trio.sleep(5)
    assert relay.authority.names == ["a.example.org"]


async def test_a_bug_in_an_order_costs_that_order(relay: Relay, autojump_clock: MockClock) -> None:
    def obtain(name: str, attempt: int) -> Issued:
        raise ZeroDivisionError

    relay.authority.obtain = obtain  # type: ignore[method-assign]
    with capture_logs() as logs:
        relay.want(["a.example.org"])
        await trio.sleep(5)
    assert "certificate not ordered: internal error" in [line["event"] for line in logs]
    assert relay.failed[0][1] == "internal error: ZeroDivisionError()"


async def test_items_say_what_will_happen(relay: Relay, autojump_clock: MockClock) -> None:
    relay.authority.failing.add("b.example.org")
    relay.want(["a.example.org", "b.example.org"])
    await trio.sleep(10)
    assert relay.item("a.example.org")["expires"] == pytest.approx(90 * DAY, abs=20)
    assert relay.item("a.example.org")["owner"] == "alice"
    assert 59 * DAY < relay.item("a.example.org")["renews"] < 64 * DAY
    failing = relay.item("b.example.org")
    assert (failing["expires"], failing["failures"]) == (None, 1)
    assert failing["renews"] == pytest.approx(295, abs=10)
    assert math.isclose(relay.store.seconds_left(now())["a.example.org"], 90 * DAY, abs_tol=20)


async def test_visitors_know_whether_a_certificate_is_on_its_way(relay: Relay) -> None:
    manager = relay.manager
    assert not manager.is_ordered("a.example.com")
    relay.authority.failing.add("b.example.com")
    relay.want(["a.example.com", "b.example.com", "c.example.com"])
    assert all(map(manager.is_ordered, ["a.example.com", "b.example.com", "c.example.com"]))
    manager.unwant("c.example.com")
    assert not manager.is_ordered("c.example.com")
    while manager.is_ordered("a.example.com") or manager.is_ordered("b.example.com"):
        await manager.order_over()
    assert relay.store.has_name("a.example.com")
    assert [name for name, _ in relay.failed] == ["b.example.com"]  # the next try is later


async def test_visitors_of_names_under_the_wildcard_wait_for_it(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    relay = Relay(tmp_path, nursery, dns_hook=("hook",))
    await relay.start()
    relay.want(["blog.t.example.org"])
    await trio.testing.wait_all_tasks_blocked()
    assert relay.manager.is_ordered("blog.t.example.org")
    await relay.manager.order_over()
    assert not relay.manager.is_ordered("blog.t.example.org")
    assert relay.store.has_name("blog.t.example.org")


async def test_an_order_that_is_put_off_is_not_waited_for(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    relay = Relay(tmp_path, nursery, max_orders="1/h")
    await relay.start()
    relay.want(["a.example.com", "b.example.com"])
    await relay.manager.order_over()
    assert [relay.manager.is_ordered(name) for name in ("a.example.com", "b.example.com")] == [True, False]
