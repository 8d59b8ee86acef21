"""Credentials over HTTP: in a header, in clear only over loopback, checked in constant time, with a bounded cache."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import AsyncIterator

import pytest
import trio
from structlog.testing import capture_logs

from tests.http.support import HttpAnswer, HttpRelay, running_http
from tests.support.credentials import SECRET, authenticator_of, counted, credential
from tests.support.peers import PATIENCE
from tunneld.auth import authenticator as authenticator_module
from tunneld.auth.authenticator import MAX_VERIFIED_SECRETS, Authenticator
from tunneld.http.auth import PUBLIC_PATHS, AuthMiddleware
from tunneld.http.translate import GRANT
from tunneld.policy.access import EVERYBODY

ALICE, ROOT = credential("alice"), credential("root", "another secret", role="admin")
NETWORKED = credential("far", networks=("192.0.2.0/24",))


@pytest.fixture
async def relay() -> AsyncIterator[HttpRelay]:
    async with running_http(authenticator=authenticator_of(ALICE, ROOT, NETWORKED)) as relay:
        yield relay


def header(name: str, secret: str, scheme: str = "Basic") -> str:
    return f"{scheme} {b64encode(f'{name}:{secret}'.encode()).decode()}"


async def send_request(relay: HttpRelay, path: str, authorization: str, method: str = "GET") -> HttpAnswer:
    return await relay.request(method, path, authorization=authorization, content_type="application/json")


@pytest.mark.parametrize("scheme", ["Basic", "Bearer", "basic", "BEARER"])
async def test_the_right_secret_authenticates(relay: HttpRelay, scheme: str) -> None:
    answer = await send_request(relay, "/api/v1/openTunnel", header("alice", SECRET, scheme), "POST")
    assert answer.status == 200
    (tunnel,) = relay.daemon.service.tunnels()
    assert tunnel.spec.owner.startswith("http alice@127.0.0.1:")


@pytest.mark.parametrize(
    "authorization",
    [
        header("alice", "wrong"),
        header("unknown", SECRET),
        header("far", SECRET),
        header("alice", ""),
        header("alice", "päss"),
        "Basic",
        "Basic !!!",
        "Digest x",
        f"Basic {b64encode(b'alice').decode()}",
        f"Basic {b64encode(bytes([255])).decode()}",
    ],
)
async def test_every_failure_gets_the_same_answer_and_is_logged(relay: HttpRelay, authorization: str) -> None:
    with capture_logs() as logs:
        answer = await send_request(relay, "/api/v1/list", authorization)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith('Basic realm="tunneld"')
    assert (answer.json["code"], answer.json["detail"]) == ("not-allowed", "authentication failed")
    (failure,) = [log for log in logs if log["event"] == "authentication failed"]
    assert (failure["peer"], failure["service"]) == ("127.0.0.1", "http")


@pytest.mark.parametrize("path", ["/", "/api/v1/list", "/metrics", "/RPC2", "/tristero/servlet/tunnel", "/nowhere"])
async def test_without_a_header_the_answer_is_a_challenge(relay: HttpRelay, path: str) -> None:
    with capture_logs() as logs:
        answer = await relay.request("GET", path)
    assert answer.status == 401
    assert "send a name and a secret" in answer.text
    assert not [log for log in logs if log["event"] == "authentication failed"]


@pytest.mark.parametrize("path", sorted(PUBLIC_PATHS))
async def test_health_checks_need_no_authentication(relay: HttpRelay, path: str) -> None:
    assert (await relay.request("GET", path)).status == 200


async def test_two_authorization_headers_are_refused(relay: HttpRelay) -> None:
    right = header("alice", SECRET)
    async with await relay.connect() as stream:
        request = f"GET /api/v1/list HTTP/1.1\r\nhost: {relay.authority}\r\nconnection: close\r\n"
        await stream.send_all(f"{request}authorization: {right}\r\nauthorization: {right}\r\n\r\n".encode())
        assert (await stream.receive_some(100)).startswith(b"HTTP/1.1 401 ")


async def test_metrics_require_the_role_admin(relay: HttpRelay) -> None:
    assert (await send_request(relay, "/metrics", header("alice", SECRET))).status == 403
    assert (await send_request(relay, "/metrics", header("root", "another secret"))).status == 200


async def test_metrics_are_open_without_credentials() -> None:
    async with running_http() as relay:
        assert (await relay.request("GET", "/metrics")).status == 200


async def test_roles_hold_over_http(relay: HttpRelay) -> None:
    assert (await send_request(relay, "/api/v1/status", header("alice", SECRET))).status == 403
    assert (await send_request(relay, "/api/v1/status", header("root", "another secret"))).status == 200


async def test_the_verb_auth_is_refused(relay: HttpRelay) -> None:
    body = b'{"args": ["x"]}'
    answer = await relay.request(
        "POST", "/api/v1/auth", body, content_type="application/json", authorization=header("alice", SECRET)
    )
    assert (answer.status, answer.json["code"]) == (400, "usage")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
async def test_a_secret_in_clear_is_accepted_over_loopback(host: str) -> None:
    assert (await answer_to(host))[0] == 200


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", ""])
async def test_a_secret_in_clear_is_refused_elsewhere(host: str) -> None:
    status, headers = await answer_to(host)
    assert status == 403
    assert b"www-authenticate" not in headers  # never challenge for a secret in clear


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
async def test_a_secret_is_accepted_over_tls_from_anywhere(host: str) -> None:
    assert (await answer_to(host, "https"))[0] == 200


async def answer_to(host: str, scheme: str = "http") -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of the middleware's answer to a correct header from this address."""
    sent: list[dict[str, object]] = []

    async def app(scope: object, _receive: object, send: object) -> None:
        assert isinstance(scope, dict)
        assert scope[GRANT] == ALICE.grant
        sent.append({"status": 200, "headers": []})

    async def send(message: object) -> None:
        assert isinstance(message, dict)
        sent.append(message)

    async def receive() -> dict[str, object]:
        raise AssertionError("the middleware reads no body")

    scope = {
        "type": "http",
        "path": "/api/v1/list",
        "scheme": scheme,
        "client": (host, 9),
        "headers": [(b"authorization", header("alice", SECRET).encode())],
    }
    await AuthMiddleware(app, authenticator_of(ALICE))(scope, receive, send)
    headers = sent[0]["headers"]
    assert isinstance(headers, list)
    return int(str(sent[0]["status"])), dict(headers)


async def test_without_credentials_every_request_is_that_of_an_admin() -> None:
    granted: list[object] = []

    async def app(scope: object, _receive: object, _send: object) -> None:
        assert isinstance(scope, dict)
        granted.append(scope[GRANT])

    scope = {"type": "http", "path": "/", "client": ("192.0.2.1", 9), "headers": []}
    await AuthMiddleware(app, Authenticator(lambda: ()))(scope, None, None)  # type: ignore[arg-type]
    assert granted == [EVERYBODY]


# Derivations


@pytest.mark.parametrize("name", ["alice", "unknown"])
async def test_a_wrong_secret_costs_one_derivation_for_known_and_unknown_names(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with counted(monkeypatch, "derive") as derivations:
        assert await authenticator_of(ALICE).admit_secret(name, "wrong", "127.0.0.1") is None
    assert len(derivations) == 1


async def test_a_correct_secret_is_derived_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [ALICE]
    authenticator = Authenticator(lambda: now)
    with counted(monkeypatch, "derive") as derivations:
        for _ in range(5):
            assert await authenticator.admit_secret("alice", SECRET, "127.0.0.1") == ALICE
    assert len(derivations) == 1
    now[0] = credential("alice", "another one")
    assert await authenticator.admit_secret("alice", SECRET, "127.0.0.1") is None
    now.clear()
    assert await authenticator.admit_secret("alice", SECRET, "127.0.0.1") is None


async def test_a_correct_secret_from_a_wrong_address_is_refused_as_slowly_as_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authenticator = authenticator_of(credential("alice", networks=["192.0.2.0/24"]))
    with counted(monkeypatch, "derive") as derivations:
        assert await authenticator.admit_secret("alice", SECRET, "192.0.2.1") is not None
        for _ in range(3):
            assert await authenticator.admit_secret("alice", SECRET, "127.0.0.1") is None
    assert len(derivations) == 4


async def test_a_flood_of_guesses_uses_one_thread_and_delays_no_cached_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authenticator, begun, release = authenticator_of(ALICE), threading.Semaphore(0), threading.Event()
    assert await authenticator.admit_secret("alice", SECRET, "127.0.0.1")

    def guess(*_: object) -> bool:
        begun.release()
        return not release.wait(PATIENCE)

    monkeypatch.setattr(authenticator_module, "matches", guess)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(authenticator.admit_secret, "alice", f"guess {number}", "127.0.0.1")
            await trio.to_thread.run_sync(begun.acquire)
            await trio.testing.wait_all_tasks_blocked()
            assert authenticator._derivations.statistics().tasks_waiting == 19
            assert await authenticator.admit_secret("alice", SECRET, "127.0.0.1") == ALICE
            release.set()


async def test_the_cache_of_verified_secrets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    authenticator = authenticator_of(ALICE)
    for number in range(MAX_VERIFIED_SECRETS + 1):
        authenticator._remember(number.to_bytes(2))
    assert len(authenticator._verified) == 1
