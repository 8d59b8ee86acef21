"""Places of connections: a credential has its share, and admins always find one."""

from __future__ import annotations

import pytest

from tunneld.errors import LimitReachedError
from tunneld.policy.access import EVERYBODY, Grant, Role
from tunneld.policy.places import Place, PlaceLimits, Places, check_share

HOME, WORK, ROOT = Grant("home"), Grant("work"), Grant("root", Role.ADMIN)


def places(maximum: int = 10, reserved: int = 2, share: float = 0.5) -> Places:
    limits = PlaceLimits(maximum, reserved, share)
    return Places("control connection", "control.max_connections", lambda: limits)


def test_a_credential_gets_its_share_and_not_one_place_more() -> None:
    pool = places()
    for _ in range(5):
        pool.claim(HOME)
    with pytest.raises(LimitReachedError, match=r"credential 'home' may have 5 of 10 \(control.credential_share\)"):
        pool.claim(HOME)
    pool.claim(WORK)


def test_users_together_leave_the_reserved_places_to_admins() -> None:
    pool = places(share=1.0)
    for number in range(8):
        pool.claim(Grant(f"user-{number}"))
    with pytest.raises(LimitReachedError, match="the last 2 of 10 are reserved for admins"):
        pool.claim(HOME)
    for _ in range(2):
        assert pool.full is None
        pool.claim(ROOT)
    assert pool.full == "10 of 10 control connections are open (control.max_connections)"
    with pytest.raises(LimitReachedError, match="10 of 10 control connections are open"):
        pool.claim(ROOT)


def test_a_released_place_is_free_again() -> None:
    pool = places(maximum=2, reserved=0)
    pool.claim(HOME)
    pool.release(HOME)
    pool.claim(HOME)
    with pytest.raises(LimitReachedError):
        pool.claim(HOME)


def test_a_connection_changes_its_credential_although_all_places_are_taken() -> None:
    pool = places(maximum=1, reserved=0)
    place = Place(pool)
    place.claim(EVERYBODY)
    assert pool.full is not None
    place.claim(HOME)
    place.release()
    place.release()
    assert pool.full is None


def test_a_connection_that_is_refused_keeps_its_place() -> None:
    pool = places(maximum=4, reserved=0)
    taken, place = [Place(pool) for _ in range(2)], Place(pool)
    for each in taken:
        each.claim(HOME)
    place.claim(WORK)
    with pytest.raises(LimitReachedError):
        place.claim(HOME)
    place.release()
    for each in taken:
        each.release()
    for _ in range(2):
        pool.claim(WORK)


def test_every_credential_has_one_place_however_small_its_share() -> None:
    places(maximum=1, reserved=1, share=0.1).claim(HOME)


def test_admins_have_no_share() -> None:
    check_share(ROOT, "tunnel", 10, 10, 0.5)
    with pytest.raises(LimitReachedError, match="tunnel limit reached"):
        check_share(HOME, "tunnel", 6, 10, 0.5)
