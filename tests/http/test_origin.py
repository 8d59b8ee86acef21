"""Refusal of cross-site requests, as tables; and that it applies to every path."""

from __future__ import annotations

import pytest

from tests.http.support import running_http
from tunneld.config.http import HttpSettings
from tunneld.http.origin import SERVLET, Head, refusal

HERE = "127.0.0.1:7011"
OPEN = {"method": "GET", "path": SERVLET}
CALL = {"method": "POST", "path": "/RPC2", "content_type": "text/xml"}
LOOK = {"method": "GET", "path": "/api/v1/list"}
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"


def status_of(*settings: HttpSettings, **parts: str) -> int:
    """The status of the refusal, or 200."""
    head = Head(**{"method": "GET", "path": "/", "server": "127.0.0.1", "host": HERE} | parts)
    problem = refusal(head, *(settings or [HttpSettings()]))
    return 200 if problem is None else problem.status.value


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7011", 200),
        ("127.0.0.1", 200),
        ("127.8.8.8:1", 200),
        ("localhost:7011", 200),
        ("localhost.", 200),
        ("[::1]:7011", 200),
        ("[::1]", 200),
        ("192.0.2.7:7011", 200),  # the address that the connection came in on
        ("relay.example:7011", 200),  # allowed
        ("bound.example", 200),  # http.host
        ("", 200),  # HTTP/1.0: no browser
        ("evil.example", 421),
        ("evil.example:7011", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("relay.example.evil.example", 421),
        ("evilrelay.example", 421),
        ("192.0.2.8", 421),
        ("0.0.0.0:7011", 421),
        ("[::]:7011", 421),
        ("[::1", 421),
        ("[evil]", 421),
        ("127.0.0.1:7011, evil.example", 421),
        ("evil.example, 127.0.0.1:7011", 421),
        ("127.0.0.1:7011@evil.example", 421),
        ("evil.example@127.0.0.1:7011", 421),
        ("127.0.0.1:7011:80", 421),
        ("2130706433", 421),
        (":7011", 421),
        (" ", 421),
    ],
)
def test_host_is_a_name_of_the_relay(host: str, status: int) -> None:
    settings = HttpSettings(host="bound.example", allowed_hosts=("relay.example",), open_to_anyone=True)
    assert status_of(settings, host=host, server="192.0.2.7") == status


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", ""])
def test_a_wildcard_is_not_a_name(wildcard: str) -> None:
    assert status_of(HttpSettings(host=wildcard, open_to_anyone=True), host="0.0.0.0", server="192.0.2.7") == 421


def test_the_refusal_of_a_host_names_the_key_to_set() -> None:
    problem = refusal(Head("GET", "/", "127.0.0.1", host="relay.example"), HttpSettings())
    assert problem is not None
    assert "'relay.example'" in problem.detail
    assert "http.allowed_hosts" in problem.detail


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1"},  # another port of the same host
    {"origin": "http://127.0.0.1:8000"},
    {"origin": "http://localhost:7011"},  # another name of the relay
    {"origin": "http://127.0.0.1:7011.evil.example"},
    {"origin": "http://127.0.0.1:7011@evil.example"},
    {"origin": "ftp://127.0.0.1:7011"},
    {"origin": "http://[::1"},
    {"origin": "http://127.0.0.1:7011, https://evil.example"},
    {"site": "cross-site"},
    {"site": "same-site"},
    {"site": "same-origin, cross-site"},
    {"site": "anything else"},
    {"origin": "http://127.0.0.1:7011", "site": "cross-site"},
    {"referer": "https://evil.example/page"},
    {"referer": "http://127.0.0.1:8000/"},
    {"referer": "http://127.0.0.1:7011.evil.example/"},
    {"referer": "about:blank"},
]
OWN = [
    {},
    {"agent": "curl/8.5.0"},
    {"agent": "Java/1.3.1", "referer": ""},
    {"origin": "http://127.0.0.1:7011"},
    {"origin": "HTTP://127.0.0.1:7011".lower(), "site": "same-origin"},
    {"site": "same-origin", "agent": FIREFOX},
    {"site": "none", "agent": FIREFOX},  # typed by a person
    {"referer": "http://127.0.0.1:7011/", "agent": FIREFOX},
    {"site": "same-origin", "referer": "https://evil.example/"},  # the more reliable header wins
]


@pytest.mark.parametrize("request_", [OPEN, CALL, {"method": "POST", "path": "/api/v1/shutdown"}, {"method": "DELETE"}])
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_change_from_another_site_is_refused(request_: dict[str, str], headers: dict[str, str]) -> None:
    assert status_of(**request_, **headers) == 403


@pytest.mark.parametrize("request_", [OPEN, CALL])
@pytest.mark.parametrize("headers", OWN, ids=str)
def test_programs_and_pages_of_the_relay_are_served(request_: dict[str, str], headers: dict[str, str]) -> None:
    assert status_of(**request_, **headers) == 200


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_read_from_another_site_is_allowed(headers: dict[str, str]) -> None:
    assert status_of(**LOOK, **headers) == 200


def test_a_browser_without_origin_headers_is_refused_where_a_plain_get_changes_something() -> None:
    assert status_of(**OPEN, agent=FIREFOX) == 403
    assert status_of(method="POST", path=SERVLET, agent=FIREFOX) == 403
    assert status_of(**CALL, agent=FIREFOX) == 200  # its content type cannot cross sites


@pytest.mark.parametrize("site", ["none", "same-origin", ""])
@pytest.mark.parametrize("mode", ["navigate", "Navigate", "cors, navigate"])
def test_the_servlet_refuses_navigations_whatever_the_site(site: str, mode: str) -> None:
    # A page that redirects a navigation from the address bar gets it through as `none`.
    assert status_of(**OPEN, site=site, mode=mode.lower(), agent=FIREFOX) == 403
    assert status_of(method="POST", path=SERVLET, site=site, mode=mode.lower(), agent=FIREFOX) == 403
    assert status_of(**LOOK, site=site, mode=mode.lower(), agent=FIREFOX) == 200
    assert status_of(**OPEN, site="same-origin", mode="cors", agent=FIREFOX) == 200


async def test_a_navigation_opens_no_tunnel() -> None:
    async with running_http() as relay:
        path = f"{SERVLET}?method=openTunnel"
        refused = await relay.request("GET", path, sec_fetch_site="none", sec_fetch_mode="Navigate")
        assert refused.status == 403
        assert "redirect" in refused.text
        assert (await relay.request("GET", path)).status == 200
        assert len(list(relay.daemon.service.tunnels())) == 1


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://relay.example", "relay.example", 200),  # behind a proxy that passes Host on
        ("https://relay.example", "relay.example:443", 200),
        ("http://relay.example:80", "relay.example", 200),
        ("https://relay.example:80", "relay.example", 403),
        ("https://relay.example:20001", "relay.example", 403),  # a tunnel on the same host
        ("https://relay.example", "", 403),
    ],
)
def test_an_origin_is_compared_with_its_port(origin: str, host: str, status: int) -> None:
    assert status_of(HttpSettings(allowed_hosts=("relay.example",)), **CALL, origin=origin, host=host) == status


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        ("/RPC2", "text/xml", 200),
        ("/", "application/xml", 200),
        ("/RPC2", "text/plain", 415),
        ("/RPC2", "", 415),
        ("/RPC2", "application/x-www-form-urlencoded", 415),
        ("/RPC2", "multipart/form-data", 415),
        ("/RPC2", "application/json", 415),
        ("/api/v1/opentunnel", "application/json", 200),
        ("/api/v1/opentunnel", "text/plain", 415),
        ("/api/v1/opentunnel", "", 415),
        ("/api/v1/opentunnel", "text/xml", 415),
        (SERVLET, "", 200),
        (SERVLET, "application/x-www-form-urlencoded", 200),
        (SERVLET, "text/plain", 415),
    ],
)
def test_a_body_needs_a_content_type_that_cannot_cross_sites(path: str, content_type: str, status: int) -> None:
    assert status_of(method="POST", path=path, content_type=content_type) == status


async def test_the_checks_apply_to_every_path() -> None:
    async with running_http() as relay:
        for path in ("/", "/RPC2", SERVLET, "/api/v1/list", "/healthz", "/readyz", "/metrics", "/nothing"):
            assert (await relay.request("GET", path, host="evil.example")).status == 421, path
        refused = await relay.request("GET", f"{SERVLET}?method=openTunnel", origin="https://evil.example")
        assert refused.status == 403
        typed = await relay.request("POST", "/RPC2", b"<x/>", content_type="text/plain; charset=utf-8")
        assert typed.status == 415
        assert list(relay.daemon.service.tunnels()) == []


async def test_a_content_type_may_have_parameters() -> None:
    async with running_http() as relay:
        answer = await relay.request("POST", "/RPC2", b"<x/>", content_type="Text/XML; charset=utf-8")
        assert answer.status == 200


async def test_no_answer_can_be_read_or_embedded_by_another_site() -> None:
    async with running_http() as relay:
        for method, path in (("GET", "/api/v1/list"), ("GET", "/nothing"), ("OPTIONS", "/RPC2"), ("GET", "/metrics")):
            answer = await relay.request(method, path)
            assert not [name for name in answer.headers if name.startswith("access-control-")]
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"
            assert "server" not in answer.headers


async def test_allowed_hosts_apply_after_a_reload() -> None:
    async with running_http() as relay:
        assert (await relay.request("GET", "/healthz", host="relay.example")).status == 421
        relay.daemon.settings = relay.daemon.settings.model_copy(
            update={"http": HttpSettings(allowed_hosts=("relay.example",))}
        )
        assert (await relay.request("GET", "/healthz", host="relay.example")).status == 200
