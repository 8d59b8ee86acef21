"""JSON and the rest of the routes, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import structlog
import trio

from tests.http.support import Face, raising, read_answer, running_http
from tunneld.control import verbs
from tunneld.control.commands import COMMANDS
from tunneld.http.origin import SERVLET
from tunneld.http.problems import INTERNAL


class TestApi:
    async def test_every_verb_is_in_the_index(self) -> None:
        async with running_http() as face:
            for path in ("/api/v1", "/api/v1/"):
                index = (await face.ask("GET", path)).json
                assert {item["verb"].split()[0] for item in index["items"]} == {row.verb for row in COMMANDS.values()}

    async def test_a_tunnel_lives_and_ends_by_json(self) -> None:
        async with running_http() as face:
            opened = await face.post_json("openTunnel", {"args": ["tcp"], "options": {"persist": True, "ttl": 60}})
            uri = opened.json["text"]
            assert (opened.status, opened.headers["content-type"]) == (200, "application/json")
            address = (await face.ask("GET", f"/api/v1/getTunnelAddress?uri={uri}")).json["text"]
            listed = (await face.ask("GET", "/api/v1/list")).json
            assert listed["text"] == "1 tunnel"
            (item,) = listed["items"]
            assert (item["server"], item["client"], item["persist"], item["up"]) == (uri, address, True, 0)
            assert "name" not in item
            for query in ("ref=t1", "arg=t1", f"ref={uri}"):
                assert (await face.ask("GET", f"/api/v1/show?{query}")).json["items"] == [item]
            assert (await face.post_json("trim", {"args": ["t1", 0]})).status == 200
            closed = await face.post_json("close", {"args": ["t1"]})
            assert closed.json == {"text": "closed t1", "items": []}
            assert (await face.ask("GET", "/api/v1/list")).json == {"text": "0 tunnels", "items": []}

    async def test_verbs_are_read_in_any_case_and_take_no_body_where_they_take_nothing(self) -> None:
        async with running_http() as face:
            assert (await face.post_json("OPENTUNNEL")).status == 200
            assert (await face.post_json("list", {})).json["text"] == "1 tunnel"
            assert (await face.ask("GET", "/api/v1/help?verb=openTunnel")).json["items"][0]["verb"].startswith("open")
            assert (await face.post_json("shutdown", {"args": ["drain"]})).status == 200
            assert face.relay.shutdowns == [True]

    @pytest.mark.parametrize(
        ("words", "detail"),
        [
            ([], "not of the form"),
            ("openTunnel", "not of the form"),
            ({"args": "tcp"}, "not of the form"),
            ({"arg": ["tcp"]}, "not of the form"),
            ({"args": [], "more": 1}, "not of the form"),
            ({"args": [None]}, "argument 1 is neither a string nor a whole number but nothing"),
            ({"args": [1.5]}, "argument 1 is neither a string nor a whole number but a fraction"),
            ({"args": ["\ud800"]}, "argument 1 has the character U+D800"),
            ({"options": {"ttl": None}}, "option ttl is neither"),
            ({"options": {"ttl": float("nan")}}, "not between 0 and"),
            ({"options": {"ttl": 1e999}}, "not between 0 and"),
            ({"options": {"": 1}}, "unrecognized option ''"),
            ({"args": ["tcp", "ssh"]}, "usage: openTunnel"),
        ],
    )
    async def test_a_mistake_is_a_problem(self, words: Any, detail: str) -> None:
        async with running_http() as face:
            answer = await face.post_json("openTunnel", words)
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
            assert list(face.relay.service.tunnels()) == []

    @pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 60_000, b"9" * 5000, b'{"args": ["t1"]} x', b"\x00"])
    async def test_what_is_not_json_is_a_problem(self, body: bytes) -> None:
        async with running_http() as face:
            answer = await face.ask("POST", "/api/v1/openTunnel", body, content_type="application/json")
            assert (answer.status, answer.json["code"]) == (400, "usage")
            assert "the body is not" in answer.json["detail"]

    @pytest.mark.parametrize(
        ("method", "path", "status", "code", "detail"),
        [
            ("GET", "/api/v1/opentunnels", 404, "usage", "did you mean openTunnel?"),
            ("GET", "/api/v1/list/more", 404, "usage", "GET / says what there is"),
            ("GET", "/api/v2/list", 404, "usage", "GET / says what there is"),
            ("GET", "/api/v1/openTunnel", 405, "usage", "openTunnel changes something: POST it"),
            ("HEAD", "/api/v1/close?arg=t1", 405, "usage", ""),
            ("PUT", "/api/v1/list", 405, "usage", "does not take PUT, only GET, HEAD, POST"),
            ("GET", "/api/v1/show?ref=t9", 404, "no-such-tunnel", "no open tunnel is called 't9'"),
            ("GET", "/api/v1/show", 400, "usage", "usage: show URI|ID"),
            ("GET", "/api/v1/list?persist=yes", 400, "usage", "list takes no persist="),
            ("GET", "/api/v1/quit", 400, "usage", "over HTTP close the connection instead"),
        ],
    )
    async def test_problems_have_fitting_statuses(
        self, method: str, path: str, status: int, code: str, detail: str
    ) -> None:
        async with running_http() as face:
            answer = await face.ask(method, path)
            assert answer.status == status
            if method != "HEAD":
                assert (answer.json["status"], answer.json["code"]) == (status, code)
                assert detail in answer.json["detail"]
            assert ("allow" in answer.headers) == (status == 405)

    async def test_a_bug_is_a_problem_without_details_and_logged_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verbs, "describe_tunnel", raising(RuntimeError("the secret")))
        async with running_http() as face:
            await face.post_json("openTunnel")
            with structlog.testing.capture_logs() as logs:
                answer = await face.ask("GET", "/api/v1/list")
            assert (answer.status, answer.json["code"], answer.json["detail"]) == (500, "internal", INTERNAL)
            (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
            assert isinstance(entry["exc_info"], RuntimeError)
            assert (await face.ask("GET", "/healthz")).status == 200


async def watchers(face: Face, count: int) -> None:
    """Wait until so many watch."""
    while len(face.relay.service.events._watchers) != count:
        await trio.lowlevel.checkpoint()


async def read_line(stream: trio.SocketStream, marker: bytes) -> Any:
    """Read until a line with `marker` is complete, and return it as the JSON that it is."""
    received = b""
    while not (marker in received and received.rstrip(b"\r").endswith(b"\n")):
        chunk = await stream.receive_some()
        assert chunk
        received += chunk
    return json.loads(next(line for line in received.split(b"\n") if marker in line))


class TestWatch:
    async def test_events_are_lines_until_the_client_leaves(self) -> None:
        async with running_http() as face:
            async with await face.connect() as stream:
                await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {face.authority}\r\n\r\n".encode())
                assert await read_line(stream, b"watching") == {"event": "watching", "id": "all"}
                assert (await face.post_json("openTunnel")).status == 200
                opened = await read_line(stream, b'"opened"')
                assert (opened["id"], opened["backend"]) == ("t1", "tcp")
            await watchers(face, 0)

    async def test_a_connection_that_watches_outlives_the_timeouts_of_requests(self) -> None:
        async with (
            running_http(read_timeout=0.02, keep_alive_timeout=0.02) as face,
            await face.connect() as idle,
            await face.connect() as stream,
        ):
            await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {face.authority}\r\n\r\n".encode())
            await read_line(stream, b"watching")
            assert await idle.receive_some() == b""  # the timeouts are over for who asks nothing
            await face.post_json("openTunnel")
            assert (await read_line(stream, b'"opened"'))["id"] == "t1"

    async def test_one_tunnel_can_be_watched_and_an_unknown_one_cannot(self) -> None:
        async with running_http() as face, await face.connect() as stream:
            assert (await face.ask("GET", "/api/v1/watch?ref=t1")).status == 404
            await face.post_json("openTunnel")
            await stream.send_all(f"GET /api/v1/watch?ref=t1 HTTP/1.1\r\nHost: {face.authority}\r\n\r\n".encode())
            assert (await read_line(stream, b"watching"))["id"] == "t1"

    async def test_head_has_no_events_and_leaves_no_watcher(self) -> None:
        async with running_http() as face:
            answer = await face.ask("HEAD", "/api/v1/watch")
            assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
            await watchers(face, 0)

    async def test_a_bug_in_the_middle_ends_the_stream_short_and_is_logged_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with running_http() as face, await face.connect() as stream:
            await stream.send_all(f"GET /api/v1/watch HTTP/1.1\r\nHost: {face.authority}\r\n\r\n".encode())
            await read_line(stream, b"watching")
            monkeypatch.setattr("tunneld.http.api.as_fields", raising(RuntimeError("the secret")))
            with structlog.testing.capture_logs() as logs:
                face.relay.service.events.publish("opened", id="t1")
                rest = b"".join([chunk async for chunk in stream])
            assert rest == b""  # without the last chunk: the client knows that something is missing
            assert [entry["log_level"] for entry in logs] == ["error"]
            assert caplog.records == []  # Hypercorn has nothing to add
            await watchers(face, 0)


class TestRest:
    async def test_the_root_and_unknown_paths_say_what_there_is(self) -> None:
        async with running_http() as face:
            assert "/tristero/servlet/tunnel" in (await face.ask("GET", "/")).text
            missing = await face.ask("GET", "/healthz/")
            assert missing.text == "404 Not Found\nnothing is at '/healthz/'; GET / says what there is\n"
            wrong = await face.ask("GET", "/RPC2")
            assert (wrong.status, wrong.headers["allow"]) == (405, "POST")

    async def test_health_is_life_and_readiness_is_taking_tunnels(self) -> None:
        async with running_http() as face:
            for method, body in (("GET", "ok\n"), ("HEAD", "")):
                for path in ("/healthz", "/readyz"):
                    answer = await face.ask(method, path)
                    assert (answer.status, answer.text) == (200, body)
            face.relay.service.draining = True
            assert (await face.ask("GET", "/healthz")).status == 200
            ready = await face.ask("GET", "/readyz")
            assert (ready.status, ready.text) == (503, "draining\n")

    async def test_curl_opens_a_tunnel(self, program_path: Any) -> None:
        async with running_http() as face:
            url = f"http://{face.authority}{SERVLET}?method=openTunnel"
            done = await trio.run_process([program_path("curl"), "-sf", url], capture_stdout=True)
            (tunnel,) = face.relay.service.tunnels()
            assert done.stdout.decode() == f"{tunnel.server_uri}\n"

    async def test_a_websocket_is_refused(self) -> None:
        async with running_http() as face:
            keys = {"connection": "upgrade", "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==", "upgrade": "websocket"}
            lines = [f"{name.replace('_', '-')}: {value}" for name, value in keys.items()]
            request = "\r\n".join(
                ["GET / HTTP/1.1", f"host: {face.authority}", "sec-websocket-version: 13", *lines, "", ""]
            )
            async with await face.connect() as stream:
                await stream.send_all(request.encode())
                assert (await read_answer(stream)).status == 403
