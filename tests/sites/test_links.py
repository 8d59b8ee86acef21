"""Shared links: tokens, revocation, the file with the key, and what is read from targets and cookies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunneld.errors import LimitReachedError, UsageError
from tunneld.net.address import HostName
from tunneld.sites import links
from tunneld.sites.links import LinkScope, ShareLinks, cookie, cookies_in, token_in

SCOPE = LinkScope("alice", HostName("blog.example"))
NOW = 1_700_000_000.0


def issued(shared: ShareLinks, seconds: float = 60.0, now: float = NOW) -> bytes:
    return shared.issue(SCOPE, now, seconds).encode()


def test_a_link_opens_its_site_until_it_expires() -> None:
    shared = ShareLinks()
    token = issued(shared)
    assert shared.expiry(token, SCOPE, NOW) == NOW + 60
    assert shared.expiry(token, SCOPE, NOW + 59.9) == NOW + 60
    assert shared.expiry(token, SCOPE, NOW + 60) is None
    assert token != issued(shared)


@pytest.mark.parametrize(
    "scope",
    [
        LinkScope("bob", HostName("blog.example")),
        LinkScope("alice", HostName("blog.example", "/a")),
        LinkScope("alice", HostName("shop.example")),
    ],
)
def test_and_no_other_site(scope: LinkScope) -> None:
    shared = ShareLinks()
    assert shared.expiry(issued(shared), scope, NOW) is None


def test_a_changed_token_is_void() -> None:
    shared = ShareLinks()
    token = issued(shared)
    for at in range(len(token)):
        changed = token[:at] + (b"A" if token[at : at + 1] != b"A" else b"B") + token[at + 1 :]
        assert shared.expiry(changed, SCOPE, NOW) is None
    for other in (b"", b"=", b"A" * 48, token[:-1], token + b"A" * 4, b"\xff" * 48, b"A" * 100_000):
        assert shared.expiry(other, SCOPE, NOW) is None


def test_the_life_of_a_link_is_limited() -> None:
    shared = ShareLinks(lambda: 60.0)
    issued(shared, 60)
    with pytest.raises(UsageError, match=r"names\.max_share"):
        issued(shared, 60.1)


def test_revoked_links_are_void_and_later_ones_are_not() -> None:
    shared = ShareLinks()
    token = issued(shared)
    shared.revoke(LinkScope("bob", SCOPE.name), NOW)
    assert shared.expiry(token, SCOPE, NOW)
    shared.revoke(SCOPE, NOW)
    assert shared.expiry(token, SCOPE, NOW) is None
    assert shared.expiry(issued(shared, now=NOW + 0.001), SCOPE, NOW + 1)


def test_links_and_revocations_outlive_the_process(tmp_path: Path) -> None:
    state = tmp_path / "state"
    shared = ShareLinks(folder=state)
    token = issued(shared)
    assert (state / links.FILE).stat().st_mode & 0o777 == 0o600
    assert ShareLinks(folder=state).expiry(token, SCOPE, NOW)
    ShareLinks(folder=state).revoke(SCOPE, NOW)
    again = ShareLinks(folder=state)
    assert again.expiry(token, SCOPE, NOW) is None
    assert again.expiry(issued(again, now=NOW + 1), SCOPE, NOW + 1)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": "zz", "revoked": {}}', '{"key": "00", "revoked": []}'])
def test_a_file_that_cannot_be_read_makes_all_links_void(tmp_path: Path, content: str) -> None:
    (tmp_path / links.FILE).write_text(content)
    shared = ShareLinks(folder=tmp_path)
    assert shared.expiry(b"A" * 48, SCOPE, NOW) is None
    assert shared.expiry(issued(shared), SCOPE, NOW)


def test_a_revocation_is_forgotten_when_its_links_have_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_REVOCATIONS", 1)
    shared = ShareLinks(lambda: 60.0, tmp_path)
    other = LinkScope("bob", HostName("shop.example"))
    shared.revoke(SCOPE, NOW)
    with pytest.raises(LimitReachedError):
        shared.revoke(other, NOW + 59)
    shared.revoke(other, NOW + 61)
    assert list(json.loads((tmp_path / links.FILE).read_text())["revoked"]) == ["bob\0shop.example"]


def test_the_token_in_a_target() -> None:
    assert token_in(b"/a?x=1") is None
    assert token_in(b"/tunneld-share=x") is None
    assert token_in(b"/?atunneld-share=x") is None
    assert token_in(b"/a?tunneld-share=abc") == (b"abc", b"/a")
    assert token_in(b"/a?x&tunneld-share=abc&y=?&tunneld-share=d") == (b"abc", b"/a?x&y=?")


def test_the_tokens_in_a_cookie_field() -> None:
    assert cookies_in(b"a=b") == ([], b"a=b")
    assert cookies_in(b"tunneld-share=x; a=b;tunneld-share=y") == ([b"x", b"y"], b"a=b")
    assert len(cookies_in(b"; ".join([b"tunneld-share=x"] * 100))[0]) == links.MAX_COOKIES


def test_a_cookie_is_sent_to_its_site_only() -> None:
    assert cookie(b"x", 60.9, "/a", is_secure=True) == (
        b"tunneld-share=x; Max-Age=60; Path=/a; HttpOnly; SameSite=Lax; Secure"
    )
