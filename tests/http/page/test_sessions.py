"""Sessions of the page: two halves, two ends, and a bounded number."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.credentials import credential
from tunneld.config.http import PageSettings
from tunneld.http.page.sessions import PageSessions

ALICE, BOB = credential("alice"), credential("bob")


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sessions(time: Time | None = None, **keys: Any) -> PageSessions:
    return PageSessions(lambda: PageSettings(**keys), time or Time())


def test_a_session_is_found_by_both_halves() -> None:
    found = sessions()
    cookie, token = found.begin(ALICE)
    session = found.find(cookie, token)
    assert session is not None
    assert session.credential is ALICE


def test_one_half_is_not_enough() -> None:
    found = sessions()
    cookie, token = found.begin(ALICE)
    other_cookie, other_token = found.begin(ALICE)
    for pair in [(cookie, other_token), (other_cookie, token), (cookie, ""), ("", token), (token, cookie), ("", "")]:
        assert found.find(*pair) is None


def test_nothing_that_is_kept_can_be_presented() -> None:
    found = sessions()
    cookie, token = found.begin(ALICE)
    kept = repr(vars(found))
    assert cookie not in kept
    assert token not in kept


@pytest.mark.parametrize(
    ("times", "lives"),
    [([59.0] * 5, True), ([60.0], False), ([59.0, 60.0], False), ([59.0] * 6, False)],
    ids=["used", "idle", "used once", "over"],
)
def test_a_session_ends_when_it_is_not_used_or_too_old(times: list[float], lives: bool) -> None:
    time = Time()
    found = sessions(time, idle_timeout=60.0, session_timeout=300.0)
    cookie, token = found.begin(ALICE)
    last = None
    for seconds in times:
        time.now += seconds
        last = found.find(cookie, token)
    assert (last is not None) is lives
    assert len(found) == lives


def test_loading_the_page_is_no_use_of_a_session() -> None:
    """The cookie alone, which another program on the machine may have, keeps no session alive."""
    time = Time()
    found = sessions(time, idle_timeout=60.0)
    cookie, token = found.begin(ALICE)
    time.now = 59.0
    assert found.find(cookie) is not None
    time.now = 61.0
    assert found.find(cookie, token) is None


def test_a_reload_applies_to_sessions_that_exist() -> None:
    time, settings = Time(), PageSettings(session_timeout=300.0)
    found = PageSessions(lambda: settings, time)
    cookie, token = found.begin(ALICE)
    time.now = 100.0
    assert found.find(cookie, token) is not None
    settings = PageSettings(session_timeout=50.0)
    assert found.find(cookie, token) is None


def test_with_too_many_of_a_credential_the_least_recently_used_ends() -> None:
    found = sessions(max_sessions_per_credential=2)
    bob = found.begin(BOB)
    first, second = found.begin(ALICE), found.begin(ALICE)
    assert found.find(*first) is not None  # so it is the second that was not used for longest
    third = found.begin(ALICE)
    assert [found.find(*pair) is not None for pair in (bob, first, second, third)] == [True, True, False, True]


def test_with_too_many_in_all_the_least_recently_used_ends() -> None:
    found = sessions(max_sessions=2)
    pairs = [found.begin(credential(name)) for name in ("one", "two", "three")]
    assert [found.find(*pair) is not None for pair in pairs] == [False, True, True]


def test_sessions_that_are_over_take_no_place() -> None:
    time = Time()
    found = sessions(time, max_sessions_per_credential=2, idle_timeout=60.0)
    old, new = found.begin(ALICE), found.begin(ALICE)
    time.now = 59.0
    assert found.find(*new) is not None
    time.now = 61.0
    found.begin(ALICE)
    assert found.find(*new) is not None
    assert found.find(*old) is None


def test_a_logout_ends_one_session() -> None:
    found = sessions()
    here, there = found.begin(ALICE), found.begin(ALICE)
    found.end(here[0])
    found.end("unknown")
    assert [found.find(*pair) is not None for pair in (here, there)] == [False, True]
