"""Host names: how they are written, which credential may have which, and how requests find their tunnel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.net.address import HostName
from tunneld.policy.names import (
    SiteTable,
    check_name,
    complete_name,
)

DOMAIN = "t.example.org"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("blog", HostName("blog.t.example.org")),
        ("Blog.T.example.org.", HostName("blog.t.example.org")),
        ("shop.example.com/api/v1/", HostName("shop.example.com", "/api/v1")),
        ("*.t.example.org", HostName("*.t.example.org")),
        ("blog/", HostName("blog.t.example.org")),
        ("a-1", HostName("a-1.t.example.org")),
        ("*", HostName("*.t.example.org")),
    ],
)
def test_names_are_read_as_users_write_them(text: str, name: HostName) -> None:
    assert complete_name(text, DOMAIN) == name
    assert complete_name(str(name), DOMAIN) == name


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "-a", "a-", "a_b", "a..b", ".a.b", "*.*.example.org", "a.*.org", "a b", "bücher", "a:80",
        "https://a.example.org", "192.0.2.1", "[::1]", "x" * 64, ".".join(["x" * 50] * 6), "a/../b", "a//b", "a/b?c",
        "a/ b", "a/" + "b" * 300, "a/.", "a\n",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"write|expected"):
        complete_name(text, DOMAIN)


def test_a_label_needs_a_domain() -> None:
    with pytest.raises(UsageError):
        complete_name("blog", "")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("blog", None), ("a-b-c", None), ("alice-1", ["alice-*"]), ("blog", ["alice-*", "blog"]),
        ("shop.example.com", ["shop.example.com"]), ("a.example.com", ["*.example.com"]), ("www", ["www"]),
        ("*.example.com", ["*.example.com"]), ("shop.example.com/api", ["shop.example.com"]),
        ("xn--bcher-kva", ["xn--bcher-kva"]),
    ],
)  # fmt: skip
def test_names_that_a_credential_may_have(text: str, patterns: list[str] | None) -> None:
    check_name(complete_name(text, DOMAIN), DOMAIN, patterns, "credential 'alice'")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("www", None), ("postmaster", None), ("shop.example.com", None), ("*.t.example.org", None),
        ("a.b.t.example.org", None), ("xn--bcher-kva", None), ("bob", ["alice-*"]),
        ("alice-1.x.t.example.org", ["alice-*"]), ("*", ["*"]), ("*.t.example.org", ["*-x", "blog"]),
        ("alice", ["alice-*"]), ("shop.example.com", ["shop"]), ("blog", []), ("a.b.example.com", ["*.example.com"]),
        ("evil-example.com", ["*.example.com"]), ("t.example.org", None),
    ],
)  # fmt: skip
def test_names_that_a_credential_may_not_have(text: str, patterns: list[str] | None) -> None:
    with pytest.raises(NotAllowedError, match=r"credential 'alice' may not use the host name .*\(names\)"):
        check_name(complete_name(text, DOMAIN), DOMAIN, patterns, "credential 'alice'")


def table(*names: str) -> SiteTable[str]:
    sites = SiteTable[str](lambda: 100)
    for name in names:
        sites.add(complete_name(name, DOMAIN), name)
    return sites


@pytest.mark.parametrize(
    ("host", "path", "found"),
    [
        ("blog.t.example.org", "/", "blog"),
        ("blog.t.example.org", "/api", "blog/api"),
        ("blog.t.example.org", "/api/", "blog/api"),
        ("blog.t.example.org", "/api/v1/x", "blog/api"),
        ("blog.t.example.org", "/apix", "blog"),
        ("blog.t.example.org", "/apix/api", "blog"),
        ("other.t.example.org", "/", "*.t.example.org"),
        ("a.other.t.example.org", "/", None),
        ("t.example.org", "/", None),
        ("only.t.example.org", "/x/y", "only/x"),
        ("only.t.example.org", "/", "*.t.example.org"),
        ("org", "/", None),
        ("", "/", None),
    ],
)
def test_a_request_finds_the_most_specific_site(host: str, path: str, found: str | None) -> None:
    sites = table("blog", "blog/api", "*.t.example.org", "only/x")
    assert sites.find(host, path) == found


def test_the_only_site_of_a_host_name_is_found_without_its_path() -> None:
    table = SiteTable[str](lambda: 10)
    for name in ("a.example", "b.example/x", "c.example", "c.example/x", "*.w.example"):
        host, slash, path = name.partition("/")
        table.add(HostName(host, slash + path), name)
    assert [table.only(host) for host in ("a.example", "b.example", "c.example", "x.w.example", "d.example")] == [
        "a.example", None, None, None, None,
    ]  # fmt: skip


def test_a_name_is_used_once_and_free_afterwards() -> None:
    sites = table("blog")
    name = complete_name("blog", DOMAIN)
    with pytest.raises(LimitReachedError, match=r"blog\.t\.example\.org is in use"):
        sites.add(name, "other")
    sites.replace(name, "newer")
    sites.remove(name, "blog")  # which has lost it
    assert sites.find(name.name) == "newer"
    sites.remove(name, "newer")
    assert (len(sites), list(sites), sites.has_host(name.name)) == (0, [], False)
    sites.add(name, "other")
    assert list(sites) == [(name, "other")]


def test_the_table_is_bounded() -> None:
    sites = SiteTable[int](lambda: 2)
    sites.add(HostName("a.example"), 1)
    sites.add(HostName("b.example"), 2)
    with pytest.raises(LimitReachedError, match="max_names"):
        sites.add(HostName("c.example"), 3)
    sites.remove(HostName("a.example"), 1)
    sites.add(HostName("c.example"), 3)


@given(st.lists(st.text("ab/", max_size=8), max_size=6), st.text("ab/", max_size=10))
def test_paths_match_by_whole_segments(prefixes: list[str], path: str) -> None:
    sites = SiteTable[str](lambda: 100)
    names = {HostName("a.example", ("/" + prefix).rstrip("/")) for prefix in prefixes if "//" not in "/" + prefix}
    for name in names:
        sites.add(name, name.path)
    asked = "/" + path
    below = [name.path for name in names if asked.rstrip("/") == name.path or asked.startswith(name.path + "/")]
    assert sites.find("a.example", asked) == max(below, key=len, default=None)
