"""The page in the eyes of a browser: files and headers, logging in and out, and what another origin cannot do."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from importlib.resources import files

import pytest
from structlog.testing import capture_logs

from tests.http.page.support import HTML, Tab
from tests.http.support import HttpRelay, running_http
from tests.support.credentials import SECRET, authenticator_of, credential
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthLimiter
from tunneld.config.credentials import Credential
from tunneld.config.schema import ControlSettings
from tunneld.http.auth import AuthMiddleware
from tunneld.http.page.files import MEDIA_TYPES

ALICE, BOB = credential("alice"), credential("bob")
ROOT, GRAFANA = credential("root", role="admin"), credential("grafana", role="viewer")
STATIC = files("tunneld.http.page") / "static"
NAMES = sorted(file.name for file in STATIC.iterdir())


@pytest.fixture
async def relay() -> AsyncIterator[HttpRelay]:
    async with running_http(authenticator=authenticator_of(ALICE, BOB, ROOT, GRAFANA)) as relay:
        yield relay


@pytest.fixture
async def open_relay() -> AsyncIterator[HttpRelay]:
    async with running_http() as relay:
        yield relay


async def logged_in(relay: HttpRelay, name: str) -> Tab:
    tab = Tab(relay)
    assert (await tab.log_in(name)).status == 200
    return tab


# Files


async def test_a_browser_gets_the_form_and_then_the_page(relay: HttpRelay) -> None:
    tab = Tab(relay)
    form = await tab.get("/", accept=HTML)
    assert (form.status, 'id="secret"' in form.text) == (200, True)
    assert form.headers["connection"] == "close"
    await tab.log_in("alice")
    page = await tab.get("/", accept=HTML)
    assert (page.status, 'id="sections"' in page.text) == (200, True)
    assert 'id="secret"' in (await tab.get("/?login", accept=HTML)).text


async def test_a_program_gets_the_table_of_paths(open_relay: HttpRelay, relay: HttpRelay) -> None:
    assert "/RPC2" in (await open_relay.request("GET", "/", accept="*/*")).text
    assert (await relay.request("GET", "/", accept="*/*")).status == 401


async def test_without_credentials_no_login_is_needed(open_relay: HttpRelay) -> None:
    tab = Tab(open_relay)
    assert 'id="sections"' in (await tab.get("/", accept=HTML)).text
    assert (await tab.verb("status")).status == 200
    assert (await tab.log_in("alice")).status == 400


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(".html")])
async def test_files_are_for_everybody_and_are_what_they_say(relay: HttpRelay, name: str) -> None:
    answer = await Tab(relay).get(f"/page/{name}")
    assert (answer.status, answer.body) == (200, (STATIC / name).read_bytes())
    assert answer.headers["content-type"] == MEDIA_TYPES[name[name.rfind(".") :]]


@pytest.mark.parametrize(
    "path",
    ["/page/nothing.js", "/page/index.html", "/page/..%2fpage.py", "/page/../../auth.py", "/page/", "/page/x/page.css"],
)
async def test_there_is_nothing_else(open_relay: HttpRelay, path: str) -> None:
    assert (await Tab(open_relay).get(path)).status == 404


async def test_the_page_confines_the_browser(relay: HttpRelay) -> None:
    tab = Tab(relay)
    for path in ("/", "/page/main.js"):
        headers = (await tab.get(path, accept=HTML)).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("name", NAMES)
def test_files_need_nothing_from_elsewhere_and_make_no_markup_of_text(name: str) -> None:
    text = (STATIC / name).read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser", text)
    assert not re.search(r"<style|style=|\son[a-z]+=\"|<script>|javascript:", text)
    assert set(re.findall(r"https?://[^\s\"'`/]+", text)) <= {"http://www.w3.org"}


async def test_the_page_can_be_disabled() -> None:
    authenticator = authenticator_of(ALICE)
    async with running_http(authenticator=authenticator, page={"enabled": False}) as relay:
        tab = Tab(relay)
        assert (await tab.get("/", accept=HTML)).status == 401
        assert (await tab.log_in("alice")).status == 401
        assert (await tab.get("/page/main.js")).status == 401
    async with running_http(page={"enabled": False}) as relay:
        tab = Tab(relay)
        assert "/RPC2" in (await tab.get("/", accept=HTML)).text
        assert [(await tab.get(path)).status for path in ("/page/stream", "/page/main.js")] == [404, 404]


# Logging in and out


async def test_a_login_begins_a_session(relay: HttpRelay) -> None:
    tab = Tab(relay)
    answer = await tab.log_in("alice")
    assert (answer.json["name"], answer.json["role"]) == ("alice", "user")
    cookie = answer.headers["set-cookie"]
    assert f"tunneld-{relay.port}=" in cookie
    for attribute in ("HttpOnly", "Path=/", "SameSite=strict", "Max-Age=43200"):
        assert attribute in cookie
    assert "Secure" not in cookie  # this connection is in clear, over loopback
    assert (await tab.verb("list")).status == 200


async def test_a_logout_ends_it(relay: HttpRelay) -> None:
    tab = await logged_in(relay, "alice")
    other = await logged_in(relay, "alice")
    answer = await tab.post("/page/logout")
    assert (answer.status, "Max-Age=0" in answer.headers["set-cookie"]) == (204, True)
    assert (await tab.verb("list")).status == 401
    assert (await other.verb("list")).status == 200


@pytest.mark.parametrize(("name", "secret"), [("alice", "wrong"), ("nobody", SECRET), ("", "")])
async def test_a_wrong_login_is_refused_and_counted(relay: HttpRelay, name: str, secret: str) -> None:
    tab = Tab(relay)
    with capture_logs() as logs:
        answer = await tab.log_in(name, secret)
    assert answer.status == 401
    assert "Basic" not in answer.headers["www-authenticate"]  # else the browser asks its user, too
    assert [log["service"] for log in logs if log["event"] == "authentication failed"] == ["http"]


async def test_after_failed_logins_the_right_secret_is_refused_as_well() -> None:
    limiter = PreauthLimiter(ControlSettings, exempt=lambda _host: False)  # loopback neither
    async with running_http(authenticator=Authenticator(lambda: [ALICE], limiter)) as relay:
        tab = Tab(relay)
        statuses = [(await tab.log_in("alice", "wrong")).status for _ in range(4)]
        assert statuses == [401, 401, 401, 429]
        answer = await tab.log_in("alice")
        assert (answer.status, int(answer.headers["retry-after"]) > 0) == (429, True)


@pytest.mark.parametrize(
    "content", [[], {"name": "alice"}, {"name": "alice", "secret": 5}, {"name": "a", "secret": "b", "c": 1}]
)
async def test_a_malformed_login_is_refused(relay: HttpRelay, content: object) -> None:
    assert (await Tab(relay).post("/page/login", content)).status == 400


async def test_a_session_ends_with_its_credential() -> None:
    credentials: list[Credential] = [ALICE, ROOT]
    async with running_http(authenticator=Authenticator(lambda: credentials)) as relay:
        tab = await logged_in(relay, "alice")
        credentials[0] = credential("alice", "another secret")
        assert (await tab.verb("list")).status == 401


# What another page or program cannot do


@pytest.mark.parametrize("missing", ["cookie", "token"])
async def test_a_request_needs_both_halves(relay: HttpRelay, missing: str) -> None:
    tab = await logged_in(relay, "root")
    setattr(tab, missing, "")
    for path in ("/api/v1/list", "/page/stream", "/metrics"):
        assert (await tab.get(path)).status == 401, path
    assert (await tab.verb("shutdown")).status == 401
    assert (await tab.post("/page/logout")).status == 401
    assert relay.daemon.shutdowns == []


async def test_halves_of_two_sessions_are_no_session(relay: HttpRelay) -> None:
    one, other = await logged_in(relay, "root"), await logged_in(relay, "root")
    one.token = other.token
    assert (await one.verb("list")).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/shutdown", "/page/login", "/page/logout"])
async def test_a_page_of_another_origin_changes_nothing(relay: HttpRelay, path: str, headers: dict[str, str]) -> None:
    tab = await logged_in(relay, "root")
    assert (await tab.post(path, **headers)).status == 403
    assert (await tab.verb("list")).status == 200
    assert relay.daemon.shutdowns == []


async def test_a_form_cannot_log_in(relay: HttpRelay) -> None:
    answer = await relay.request("POST", "/page/login", b"{}", content_type="text/plain")
    assert answer.status == 415


@pytest.mark.parametrize("path", ["/", "/page/stream", "/page/main.js"])
async def test_another_name_of_this_machine_is_refused(open_relay: HttpRelay, path: str) -> None:
    """As after DNS rebinding."""
    answer = await open_relay.request("GET", path, host="evil.example", accept=HTML)
    assert answer.status == 421


@pytest.mark.parametrize("path", ["/", "/page/login", "/page/main.js"])
async def test_a_secret_in_clear_is_refused_from_elsewhere(path: str) -> None:
    async with running_http(authenticator=authenticator_of(ALICE)) as relay:
        status, text = await answer_from(relay, "192.0.2.1", path)
    assert status == 403
    assert "[http.tls]" in text
    assert "ssh -L 7011:127.0.0.1:7011" in text


async def answer_from(relay: HttpRelay, host: str, path: str) -> tuple[int, str]:
    """The answer of the middleware to a client at another address."""
    sent: list[dict[str, object]] = []

    async def app(_scope: object, _receive: object, _send: object) -> None:
        raise AssertionError("passed on")

    async def receive() -> dict[str, object]:
        raise AssertionError("the middleware reads no body")

    async def send(message: object) -> None:
        assert isinstance(message, dict)
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST" if path.endswith("login") else "GET",
        "path": path,
        "scheme": "http",
        "client": (host, 9),
        "headers": [(b"accept", HTML.encode())],
    }
    assert relay.authenticator is not None
    await AuthMiddleware(app, relay.authenticator)(scope, receive, send)
    body = sent[1]["body"]
    assert isinstance(body, bytes)
    return int(str(sent[0]["status"])), body.decode()


# Roles


async def test_roles_hold_for_the_page(relay: HttpRelay) -> None:
    alice, bob = await logged_in(relay, "alice"), await logged_in(relay, "bob")
    root, grafana = await logged_in(relay, "root"), await logged_in(relay, "grafana")
    assert (await alice.verb("openTunnel")).status == 200
    (tunnel,) = relay.daemon.service.tunnels()
    listed = [len((await tab.verb("list")).json["items"]) for tab in (alice, bob, root, grafana)]
    assert listed == [1, 0, 1, 1]
    assert [(await tab.verb("status")).status for tab in (alice, bob, root, grafana)] == [403, 403, 200, 200]
    assert [(await tab.verb("ban", "192.0.2.1")).status for tab in (alice, bob, grafana, root)] == [403, 403, 403, 200]
    assert [(await tab.verb("close", tunnel.id)).status for tab in (bob, grafana, alice)] == [404, 403, 200]
