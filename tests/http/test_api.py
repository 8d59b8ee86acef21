"""The JSON interface and the remaining routes, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import structlog
import trio

from tests.http.support import HttpRelay, raising, read_answer, running_http
from tunneld.control import describe
from tunneld.control.commands import COMMANDS
from tunneld.http.origin import SERVLET
from tunneld.http.problems import INTERNAL


class TestApi:
    async def test_every_verb_is_in_the_index(self) -> None:
        async with running_http() as relay:
            for path in ("/api/v1", "/api/v1/"):
                index = (await relay.request("GET", path)).json
                assert {item["verb"].split()[0] for item in index["items"]} == {row.verb for row in COMMANDS.values()}

    async def test_a_tunnel_is_opened_shown_and_closed(self) -> None:
        async with running_http() as relay:
            opened = await relay.post_json("openTunnel", {"args": ["tcp"], "options": {"persist": True, "ttl": 60}})
            uri = opened.json["text"]
            assert (opened.status, opened.headers["content-type"]) == (200, "application/json")
            address = (await relay.request("GET", f"/api/v1/getTunnelAddress?uri={uri}")).json["text"]
            listed = (await relay.request("GET", "/api/v1/list")).json
            assert listed["text"] == "1 tunnel"
            (item,) = listed["items"]
            assert (item["server"], item["client"], item["persist"], item["up"]) == (uri, address, True, 0)
            assert "name" not in item
            for query in ("ref=t1", "arg=t1", f"ref={uri}"):
                assert (await relay.request("GET", f"/api/v1/show?{query}")).json["items"] == [item]
            assert (await relay.post_json("trim", {"args": ["t1", 0]})).status == 200
            closed = await relay.post_json("close", {"args": ["t1"]})
            assert closed.json == {"text": "closed t1", "items": []}
            assert (await relay.request("GET", "/api/v1/list")).json == {"text": "0 tunnels", "items": []}

    async def test_verbs_are_case_insensitive_and_a_body_is_optional(self) -> None:
        async with running_http() as relay:
            assert (await relay.post_json("OPENTUNNEL")).status == 200
            assert (await relay.post_json("list", {})).json["text"] == "1 tunnel"
            assert (
                (await relay.request("GET", "/api/v1/help?verb=openTunnel")).json["items"][0]["verb"].startswith("open")
            )
            assert (await relay.post_json("shutdown", {"args": ["drain"]})).status == 200
            assert relay.daemon.shutdowns == [True]

    @pytest.mark.parametrize(
        ("content", "detail"),
        [
            ([], "not of the form"),
            ("openTunnel", "not of the form"),
            ({"args": "tcp"}, "not of the form"),
            ({"arg": ["tcp"]}, "not of the form"),
            ({"args": [], "more": 1}, "not of the form"),
            ({"args": [None]}, "argument 1 is neither a string nor an integer but null"),
            ({"args": [1.5]}, "argument 1 is neither a string nor an integer but a fraction"),
            ({"args": ["\ud800"]}, "argument 1 contains the character U+D800"),
            ({"options": {"ttl": None}}, "option ttl is neither"),
            ({"options": {"ttl": float("nan")}}, "not between 0 and"),
            ({"options": {"ttl": 1e999}}, "not between 0 and"),
            ({"options": {"": 1}}, "unrecognized option ''"),
            ({"args": ["tcp", "ssh"]}, "usage: openTunnel"),
        ],
    )
    async def test_a_malformed_request_is_a_problem(self, content: Any, detail: str) -> None:
        async with running_http() as relay:
            answer = await relay.post_json("openTunnel", content)
            assert answer.headers["content-type"] == "application/problem+json"
            problem = answer.json
            assert {**problem, "detail": ""} == {
                "type": "about:blank",
                "title": "Bad Request",
                "status": 400,
                "detail": "",
                "code": "usage",
            }
            assert detail in problem["detail"]
            assert answer.status == 400
            assert list(relay.daemon.service.tunnels()) == []

    @pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 60_000, b"9" * 5000, b'{"args": ["t1"]} x', b"\x00"])
    async def test_a_body_that_is_not_json_is_a_problem(self, body: bytes) -> None:
        async with running_http() as relay:
            answer = await relay.request("POST", "/api/v1/openTunnel", body, content_type="application/json")
            assert (answer.status, answer.json["code"]) == (400, "usage")
            assert "the body is not" in answer.json["detail"]

    @pytest.mark.parametrize(
        ("method", "path", "status", "code", "detail"),
        [
            ("GET", "/api/v1/opentunnels", 404, "usage", "did you mean openTunnel?"),
            ("GET", "/api/v1/list/more", 404, "usage", "GET / lists the paths"),
            ("GET", "/api/v2/list", 404, "usage", "GET / lists the paths"),
            ("GET", "/api/v1/openTunnel", 405, "usage", "openTunnel changes something; use POST"),
            ("HEAD", "/api/v1/close?arg=t1", 405, "usage", ""),
            ("PUT", "/api/v1/list", 405, "usage", "does not support PUT, only GET, HEAD, POST"),
            ("GET", "/api/v1/show?ref=t9", 404, "no-such-tunnel", "no open tunnel is called 't9'"),
            ("GET", "/api/v1/show", 400, "usage", "usage: show URI|ID"),
            ("GET", "/api/v1/list?persist=yes", 400, "usage", "list does not accept persist="),
            ("GET", "/api/v1/quit", 400, "usage", "over HTTP, close the connection instead"),
        ],
    )
    async def test_problems_have_fitting_statuses(
        self, method: str, path: str, status: int, code: str, detail: str
    ) -> None:
        async with running_http() as relay:
            answer = await relay.request(method, path)
            assert answer.status == status
            if method != "HEAD":
                assert (answer.json["status"], answer.json["code"]) == (status, code)
                assert detail in answer.json["detail"]
            assert ("allow" in answer.headers) == (status == 405)

    async def test_a_bug_is_a_problem_without_details_and_is_logged_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(describe, "describe_tunnel", raising(RuntimeError("the secret")))
        async with running_http() as relay:
            await relay.post_json("openTunnel")
            with structlog.testing.capture_logs() as logs:
                answer = await relay.request("GET", "/api/v1/list")
            assert (answer.status, answer.json["code"], answer.json["detail"]) == (500, "internal", INTERNAL)
            (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
            assert isinstance(entry["exc_info"], RuntimeError)
            assert (await relay.request("GET", "/healthz")).status == 200


async def watchers(relay: HttpRelay, count: int) -> None:
    """Wait until `count` clients watch."""
    while len(relay.daemon.service.events._watchers) != count:
        await trio.lowlevel.checkpoint()


async def read_line(stream: trio.SocketStream, marker: bytes) -> Any:
    """Read until a line with `marker` is complete, and return it as parsed JSON."""
    received = b""
    while not (marker in received and received.rstrip(b"\r").endswith(b"\n")):
        chunk = await stream.receive_some()
        assert chunk
        received += chunk
    return json.loads(next(line for line in received.split(b"\n") if marker in line))


class TestWatch:
    async def test_events_are_lines_until_the_client_closes(self) -> None:
        async with running_http() as relay:
            async with await relay.connect() as stream:
                await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {relay.authority}\r\n\r\n".encode())
                assert await read_line(stream, b"watching") == {"event": "watching", "id": "all"}
                assert (await relay.post_json("openTunnel")).status == 200
                opened = await read_line(stream, b'"opened"')
                assert (opened["id"], opened["backend"]) == ("t1", "tcp")
            await watchers(relay, 0)

    async def test_a_watch_is_exempt_from_the_timeouts_of_requests(self) -> None:
        async with (
            running_http(read_timeout=0.02, keep_alive_timeout=0.02) as relay,
            await relay.connect() as idle,
            await relay.connect() as stream,
        ):
            await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {relay.authority}\r\n\r\n".encode())
            await read_line(stream, b"watching")
            assert await idle.receive_some() == b""  # an idle connection has timed out
            await relay.post_json("openTunnel")
            assert (await read_line(stream, b'"opened"'))["id"] == "t1"

    async def test_one_tunnel_can_be_watched_but_an_unknown_one_cannot(self) -> None:
        async with running_http() as relay, await relay.connect() as stream:
            assert (await relay.request("GET", "/api/v1/watch?ref=t1")).status == 404
            await relay.post_json("openTunnel")
            await stream.send_all(f"GET /api/v1/watch?ref=t1 HTTP/1.1\r\nHost: {relay.authority}\r\n\r\n".encode())
            assert (await read_line(stream, b"watching"))["id"] == "t1"

    async def test_head_of_watch_leaves_no_watcher(self) -> None:
        async with running_http() as relay:
            answer = await relay.request("HEAD", "/api/v1/watch")
            assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
            await watchers(relay, 0)

    async def test_a_bug_during_a_stream_truncates_it_and_is_logged_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with running_http() as relay, await relay.connect() as stream:
            await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {relay.authority}\r\n\r\n".encode())
            await read_line(stream, b"watching")
            monkeypatch.setattr("tunneld.http.api.as_fields", raising(RuntimeError("the secret")))
            with structlog.testing.capture_logs() as logs:
                relay.daemon.service.events.publish("opened", id="t1")
                rest = b"".join([chunk async for chunk in stream])
            assert rest == b""  # without the last chunk: the client knows that something is missing
            assert [entry["log_level"] for entry in logs] == ["error"]
            assert caplog.records == []  # Hypercorn has nothing to add
            await watchers(relay, 0)


class TestRest:
    async def test_the_root_lists_the_paths_and_unknown_paths_refer_to_it(self) -> None:
        async with running_http() as relay:
            assert "/tristero/servlet/tunnel" in (await relay.request("GET", "/")).text
            missing = await relay.request("GET", "/healthz/")
            assert missing.text == "404 Not Found\nthere is nothing at '/healthz/'; GET / lists the paths\n"
            wrong = await relay.request("GET", "/RPC2")
            assert (wrong.status, wrong.headers["allow"]) == (405, "POST")

    async def test_a_draining_relay_is_healthy_but_not_ready(self) -> None:
        async with running_http() as relay:
            for method, body in (("GET", "ok\n"), ("HEAD", "")):
                for path in ("/healthz", "/readyz"):
                    answer = await relay.request(method, path)
                    assert (answer.status, answer.text) == (200, body)
            relay.daemon.service.draining = True
            assert (await relay.request("GET", "/healthz")).status == 200
            ready = await relay.request("GET", "/readyz")
            assert (ready.status, ready.text) == (503, "draining\n")

    async def test_curl_opens_a_tunnel(self, program_path: Any) -> None:
        async with running_http() as relay:
            url = f"http://{relay.authority}{SERVLET}?method=openTunnel"
            done = await trio.run_process([program_path("curl"), "-sf", url], capture_stdout=True)
            (tunnel,) = relay.daemon.service.tunnels()
            assert done.stdout.decode() == f"{tunnel.server_uri}\n"

    async def test_an_upgrade_to_websocket_is_declined(self) -> None:
        async with running_http() as relay:
            keys = {"connection": "upgrade", "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==", "upgrade": "websocket"}
            lines = [f"{name.replace('_', '-')}: {value}" for name, value in keys.items()]
            request = "\r\n".join(
                ["GET / HTTP/1.1", f"host: {relay.authority}", "sec-websocket-version: 13", *lines, "", ""]
            )
            async with await relay.connect() as stream:
                await stream.send_all(request.encode())
                answer = await read_answer(stream)  # RFC 9110 §7.8: a server may ignore the header
                assert (answer.status, "upgrade" in answer.headers) == (200, False)
