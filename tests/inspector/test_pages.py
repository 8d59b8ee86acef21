"""Which requests the page answers, and with what."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.inspector.support import PORT, TOKEN, PagesHere, Recorded, recorded
from tunneld.inspector.pages import PREFIX
from tunneld.inspector.replay import ReplayTarget
from tunneld.inspector.store import ExchangeStore
from tunneld.inspector.web import PageAnswer

API = f"{PREFIX}api/"


def with_one() -> PagesHere:
    made = recorded(
        b"GET /x?token=t HTTP/1.1\r\nCookie: sid=9\r\n\r\n", b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}'
    )
    return PagesHere(made.store)


async def test_the_link_sets_a_strict_cookie_and_nothing_works_without() -> None:
    here = PagesHere()
    answer = await here.get(f"/?token={TOKEN}", cookie="")
    cookie = dict(answer.headers)["Set-Cookie"]
    assert cookie == f"tunneld_inspector_{PORT}={TOKEN}; Path={PREFIX}; HttpOnly; SameSite=Strict"
    assert (await here.get("/?token=wrong", cookie="")).status == 401
    for path in ("", "inspector.js", "api/events", "api/har", "api/exchanges/1"):
        assert (await here.get(PREFIX + path, cookie="")).status == 401
        assert (await here.get(PREFIX + path, cookie=f"tunneld_inspector_{PORT}=wrong")).status == 401
    assert (await here.post(f"{API}clear", b"{}", cookie="")).status == 401


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "", "127.0.0.1.evil.example", "a@127.0.0.1"])
async def test_other_names_are_refused(host: str) -> None:
    assert (await PagesHere().get(PREFIX, host=host)).status == 421


@pytest.mark.parametrize("host", ["localhost", f"localhost:{PORT}", "127.0.0.1:9999", "[::1]:4040", "[::1]"])
async def test_addresses_of_this_machine_are_taken(host: str) -> None:
    assert (await PagesHere().get(PREFIX, host=host)).status == 200


async def test_other_origins_are_refused() -> None:
    here = with_one()
    assert (await here.get(f"{API}exchanges/1", origin="http://127.0.0.1:8000")).status == 403
    assert (await here.get(f"{API}exchanges/1", sec_fetch_site="same-site")).status == 403
    assert (await here.get(f"{API}exchanges/1", sec_fetch_site="same-origin")).status == 200
    assert (await here.post(f"{API}clear", b"{}", origin="")).status == 403
    assert (await here.post(f"{API}clear", b"{}", origin="http://127.0.0.1:8000")).status == 403
    assert (await here.post(f"{API}clear", b"{}", content_type="text/plain")).status == 415
    assert len(here.recorder.store) == 1
    assert (await here.post(f"{API}clear", b"{}")).status == 200
    assert len(here.recorder.store) == 0


async def test_all_answers_forbid_what_the_page_does_not_need() -> None:
    here = PagesHere()
    for answer in (await here.get(PREFIX), await here.get(PREFIX, cookie=""), await here.get(PREFIX, host="evil")):
        headers = dict(answer.headers)
        assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    page = (await here.get(PREFIX)).body
    assert b"<style" not in page
    assert b"style=" not in page
    assert page.count(b"<script") == page.count(b'<script type="module" src="inspector.js">') == 1


async def test_one_exchange() -> None:
    here = with_one()
    shown = json.loads((await here.get(f"{API}exchanges/1")).body)
    assert shown["target"] == "/x?token=[redacted]"
    assert shown["request"]["headers"] == [["Cookie", "sid=[redacted]"]]
    assert (shown["response"]["kind"], shown["response"]["text"]) == ("json", '{"a": 1}')
    assert b"sid=9" in (await here.get(f"{API}exchanges/1?reveal=1")).body
    saved = await here.get(f"{API}exchanges/1/response")
    assert (saved.body, saved.content_type) == (b'{"a": 1}', "application/octet-stream")
    assert dict(saved.headers)["Content-Disposition"].startswith("attachment")
    assert (await here.get(f"{API}exchanges/1/curl")).body.startswith(b"curl -i ")
    assert json.loads((await here.get(f"{API}har")).body)["log"]["version"] == "1.2"
    assert (await here.get(f"{API}har?id=1")).status == 200
    for path in ("exchanges/2", "exchanges/1/other", "exchanges/x", "har?id=2", "nothing"):
        assert (await here.get(API + path)).status == 404


async def take(events: AsyncIterator[bytes], count: int) -> list[tuple[str, Any]]:
    """The next events."""
    found = []
    for _ in range(count):
        name, data = (await anext(events)).decode().strip().split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def pieces_of(answer: PageAnswer) -> AsyncIterator[bytes]:
    assert answer.pieces is not None
    return answer.pieces()


async def test_the_list_is_live(autojump_clock: MockClock) -> None:
    store = ExchangeStore(with_one().recorder.store.limits)
    here, made = PagesHere(store), Recorded(store)
    made.ask(b"GET /first HTTP/1.1\r\n\r\n")
    events = pieces_of(await here.get(f"{API}events"))
    reset, rows, state = await take(events, 3)
    assert (reset[0], rows[0], state[0]) == ("reset", "rows", "state")
    assert [(row["target"], row["status"]) for row in rows[1]] == [("/first", None)]
    made.reply(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
    rows, state = await take(events, 2)
    assert [(row["id"], row["status"]) for row in rows[1]] == [(1, 500)]
    store.clear()
    assert (await take(events, 1))[0] == ("gone", [1])
    await events.aclose()  # type: ignore[attr-defined]
    assert not store._watches


async def test_the_live_list_has_what_matches(autojump_clock: MockClock) -> None:
    store = ExchangeStore(with_one().recorder.store.limits)
    here, made = PagesHere(store), Recorded(store)
    events = pieces_of(await here.get(f"{API}events?q=is:open"))
    await take(events, 2)
    made.ask(b"GET /slow HTTP/1.1\r\n\r\n")
    assert (await take(events, 2))[0][1][0]["target"] == "/slow"
    made.reply(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert (await take(events, 1))[0] == ("gone", [1])
    await events.aclose()  # type: ignore[attr-defined]
    for path in ("check", "events"):
        answer = await here.get(f"{API}{path}?q=status:odd")
        assert (answer.status, answer.body[:13]) == (400, b"status: takes")
    assert (await here.get(f"{API}check?q=status:404")).status == 200


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[" * 5000, "is not JSON"),
        (b"{}", "has no id"),
        (b'{"id": true}', "has no id"),
        (b'{"id": 1, "method": 2}', "method is not a string"),
        (b'{"id": 1, "headers": [["a"]]}', "not a name and a value"),
        (b'{"id": 1, "headers": "a"}', "not a list"),
        (b'{"id": 1, "base64": "?"}', "base64 is not valid"),
    ],
)
async def test_replays_that_are_not_understood(body: bytes, reason: str) -> None:
    here = with_one()

    async def dial() -> Any:
        raise AssertionError

    here.inspected.servers["blog"] = ReplayTarget(dial, "http://127.0.0.1:1")
    answer = await here.post(f"{API}replay", body)
    assert answer.status == 422
    assert reason in answer.body.decode()


async def test_a_replay_after_the_end_of_its_exposure() -> None:
    assert (await with_one().post(f"{API}replay", b'{"id": 1}')).status == 409
    await trio.lowlevel.checkpoint()
