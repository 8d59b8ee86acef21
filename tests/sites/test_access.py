"""What is read from a request, and what is remembered."""

from __future__ import annotations

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.auth.remembered import Remembered
from tunneld.sites.access import basic_login, field_values
from tunneld.sites.fields import Passage


@pytest.mark.parametrize(
    ("value", "login"),
    [
        (b"Basic " + b64encode(b"alice:pass:word"), ("alice", "pass:word")),
        (b"bAsIc   " + b64encode(b":"), ("", "")),
        (b"Basic " + b64encode("é:ü".encode()), ("é", "ü")),
        (b"Basic " + b64encode(b"alice"), None),
        (b"Basic", None),
        (b"Basic %%%", None),
        (b"Bearer " + b64encode(b"alice:x"), None),
        (b"", None),
    ],
)
def test_a_login_in_a_field(value: bytes, login: tuple[str, str] | None) -> None:
    assert basic_login(value) == login


@given(st.binary())
def test_any_value_is_a_login_or_none(value: bytes) -> None:
    basic_login(value)
    basic_login(b"Basic " + value)
    basic_login(b"Basic " + b64encode(value))


def test_fields_are_found_in_any_case() -> None:
    fields = [(b"Cookie", b"a"), (b"X-Cookie", b"b"), (b"COOKIE", b"c")]
    assert field_values(fields, b"cookie") == [b"a", b"c"]


def test_a_decision_holds_for_its_time() -> None:
    kept = Remembered[bool](lambda: 10.0)
    digest = kept.digest(b"secret")
    assert kept.get(digest, 0.0) is None
    kept.put(digest, False, 0.0)
    assert kept.get(digest, 9.9) is False
    assert kept.get(digest, 10.0) is None


def test_the_oldest_decision_makes_room() -> None:
    kept = Remembered[int](lambda: 10.0, max_entries=2)
    digests = [kept.digest(b"%d" % number) for number in range(3)]
    for number in (0, 1, 0, 2):
        kept.put(digests[number], number, 0.0)
    assert [kept.get(digest, 1.0) for digest in digests] == [0, None, 2]
    assert len(kept) == 2


def test_nothing_is_kept_for_no_time() -> None:
    kept = Remembered[int](lambda: 0.0)
    kept.put(kept.digest(b"x"), 1, 0.0)
    assert len(kept) == 0


def test_digests_tell_parts_apart_and_differ_between_tables() -> None:
    kept = Remembered[int](lambda: 1.0)
    assert kept.digest(b"ab", b"c") != kept.digest(b"a", b"bc")
    assert kept.digest(b"ab") != Remembered[int](lambda: 1.0).digest(b"ab")


def test_a_passage_changes_requests_and_responses() -> None:
    passage = Passage(
        removed=frozenset((b"remote-user",)),
        added=((b"Remote-User", b"alice"),),
        set_in_response=((b"X-Set", b"new"),),
        added_to_response=((b"Set-Cookie", b"a=b"),),
    )
    request = [(b"Remote_User", b"root"), (b"REMOTE-USER", b"root"), (b"Accept", b"*")]
    assert passage.of_request(request) == [(b"Accept", b"*"), (b"Remote-User", b"alice")]
    response = [(b"x-set", b"old"), (b"Set-Cookie", b"c=d")]
    assert passage.of_response(response) == [
        (b"Set-Cookie", b"c=d"),
        (b"X-Set", b"new"),
        (b"Set-Cookie", b"a=b"),
    ]
