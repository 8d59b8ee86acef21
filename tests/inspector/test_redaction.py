"""Secrets are hidden, and come back in a replay."""

from __future__ import annotations

import pytest

from tunneld.inspector.redaction import hide_headers, hide_target, restore_headers, restore_target


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("Authorization", "Bearer abc", "Bearer [redacted]"),
        ("authorization", "abc", "[redacted]"),
        ("Proxy-Authorization", "Basic abc", "Basic [redacted]"),
        ("Cookie", "a=1; b=2", "a=[redacted]; b=[redacted]"),
        ("Set-Cookie", "sid=1; Path=/; HttpOnly", "sid=[redacted]; Path=/; HttpOnly"),
        ("X-API-Key", "abc", "[redacted]"),
        ("Location", "/next?token=abc", "/next?token=[redacted]"),
        ("Accept", "token=abc", "token=abc"),
    ],
)
def test_fields(name: str, value: str, hidden: str) -> None:
    assert hide_headers([(name, value)]) == [(name, hidden)]


@pytest.mark.parametrize(
    ("target", "hidden"),
    [
        ("/a?token=1&b=2", "/a?token=[redacted]&b=2"),
        ("/a?API_KEY=1", "/a?API_KEY=[redacted]"),
        ("/a?apikey=1&client-secret=x#top", "/a?apikey=[redacted]&client-secret=[redacted]#top"),
        ("/a?monkey=1&keyboard=2&tokens=3", "/a?monkey=1&keyboard=2&tokens=3"),
        ("/a?token=&key", "/a?token=&key"),
        ("/token/abc", "/token/abc"),
    ],
)
def test_queries(target: str, hidden: str) -> None:
    assert hide_target(target) == hidden


def test_the_hidden_ones_are_restored_where_they_were_not_edited() -> None:
    original = [("Cookie", "a=1"), ("Authorization", "Bearer x"), ("X-Api-Key", "k")]
    edited = [("authorization", "Bearer [redacted]"), ("Cookie", "a=[redacted]"), ("X-Api-Key", "other"), ("New", "1")]
    assert restore_headers(edited, original) == [
        ("authorization", "Bearer x"),
        ("Cookie", "a=1"),
        ("X-Api-Key", "other"),
        ("New", "1"),
    ]
    assert restore_target("/b?token=[redacted]&x=2&key=[redacted]", "/a?token=1&token=2") == (
        "/b?token=1&x=2&key=[redacted]"
    )
    assert restore_target("/b", "/a?token=1") == "/b"
