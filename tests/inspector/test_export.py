"""curl commands that do the same, and HAR files with the fields of HAR 1.2."""

from __future__ import annotations

import base64
import json
import shlex
from typing import Any

import pytest

from tests.inspector.support import Recorded, recorded
from tests.inspector.test_websocket import frame, opened
from tunneld.inspector.export import curl_command, har_of

BASE = "http://127.0.0.1:8000"
LIMIT = 10_000


REQUEST = (
    b"POST /login?token=t&x=1 HTTP/1.1\r\nHost: blog\r\nCookie: sid=9\r\n"
    b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
)
RESPONSE = (
    b"HTTP/1.1 302 Found\r\nSet-Cookie: sid=8; Path=/\r\nLocation: /home?key=k\r\nContent-Length: 2\r\n\r\n\xff\x00"
)


def posted(body: bytes = b"a='1'&b=2", kind: str = "application/x-www-form-urlencoded") -> Recorded:
    return recorded(REQUEST % (kind.encode(), len(body), body), RESPONSE)


def words(command: str) -> list[str]:
    return shlex.split(command)


def test_curl_redacts_and_reveals() -> None:
    made = posted().one
    hidden, shown = curl_command(made, BASE, reveal=False), curl_command(made, BASE, reveal=True)
    assert words(shown) == [
        *(
            "curl",
            "-i",
            "-H",
            "Host: blog",
            "-H",
            "Cookie: sid=9",
            "-H",
            "Content-Type: application/x-www-form-urlencoded",
        ),
        *("--data-raw", "a='1'&b=2", f"{BASE}/login?token=t&x=1"),
    ]
    assert "sid=9" not in hidden
    assert f"{BASE}/login?token=[redacted]&x=1" in words(hidden)


def test_curl_says_if_the_body_is_cut() -> None:
    made = posted().one
    assert made.request is not None
    made.request.size = 500
    assert curl_command(made, BASE, reveal=True).startswith("# only 9 of 500 bytes of the body\ncurl ")


def test_curl_with_binary_bodies_and_other_methods() -> None:
    made = posted(b"\x00\xff", "image/png").one
    assert made.request is not None
    made.request.method = "PUT"
    command = curl_command(made, BASE, reveal=True)
    assert command.startswith(f"echo {base64.b64encode(bytes((0, 255))).decode()} | base64 -d | curl -i -X PUT ")
    assert "--data-binary @-" in command
    head = recorded(b"HEAD /x HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n", b"").one
    assert words(curl_command(head, BASE, reveal=True)) == ["curl", "-i", "--head", "--compressed", f"{BASE}/x"]


PAIR = {"name": str, "value": str}
NUMBER = (int, float)
FIELDS: dict[str, Any] = {
    "log": {
        "version": str,
        "creator": {"name": str, "version": str},
        "entries": [
            {
                "startedDateTime": str,
                "time": NUMBER,
                "request": {
                    "method": str,
                    "url": str,
                    "httpVersion": str,
                    "cookies": [PAIR],
                    "headers": [PAIR],
                    "queryString": [PAIR],
                    "headersSize": int,
                    "bodySize": int,
                },
                "response": {
                    "status": int,
                    "statusText": str,
                    "httpVersion": str,
                    "cookies": [PAIR],
                    "headers": [PAIR],
                    "content": {"size": int, "mimeType": str},
                    "redirectURL": str,
                    "headersSize": int,
                    "bodySize": int,
                },
                "cache": {},
                "timings": {"send": NUMBER, "wait": NUMBER, "receive": NUMBER},
            }
        ],
    }
}
"""The required fields of HAR 1.2 (http://www.softwareishard.com/blog/har-12-spec/)."""


def check(value: Any, fields: Any, where: str = "har") -> None:
    """Fail unless all required fields are there, of their types; other fields begin with `_` or are optional."""
    match fields:
        case dict():
            assert isinstance(value, dict), where
            assert fields.keys() <= value.keys(), f"{where}: {fields.keys() - value.keys()} missing"
            optional = {"postData", "comment", "text", "encoding"}
            assert {key for key in value.keys() - fields.keys() if key[0] != "_"} <= optional, where
            for key, field in fields.items():
                check(value[key], field, f"{where}.{key}")
        case [item]:
            assert isinstance(value, list), where
            for index, one in enumerate(value):
                check(one, item, f"{where}[{index}]")
        case _:
            assert isinstance(value, fields), where
            assert not isinstance(value, bool), where


def entries(made: Recorded, *, reveal: bool = False) -> list[dict[str, Any]]:
    har = json.loads(json.dumps(har_of(made.all, LIMIT, reveal=reveal)))
    check(har, FIELDS)
    found: list[dict[str, Any]] = har["log"]["entries"]
    for entry in found:
        assert entry["time"] == pytest.approx(sum(entry["timings"].values()))
        assert entry["startedDateTime"].endswith("+00:00")
    return found


def test_har_has_its_fields_and_no_secrets() -> None:
    (entry,) = entries(posted())
    assert entry["request"]["url"] == "http://blog/login?token=[redacted]&x=1"
    assert entry["request"]["queryString"][1] == {"name": "x", "value": "1"}
    assert entry["request"]["postData"]["params"][1] == {"name": "b", "value": "2"}
    assert entry["request"]["cookies"] == [{"name": "sid", "value": "[redacted]"}]
    assert entry["response"]["cookies"] == [{"name": "sid", "value": "[redacted]"}]
    assert entry["response"]["redirectURL"] == "/home?key=[redacted]"
    assert base64.b64decode(entry["response"]["content"]["text"]) == b"\xff\x00"
    assert "sid=9" in json.dumps(entries(posted(), reveal=True))


def test_har_of_requests_without_an_answer_and_of_other_connections() -> None:
    waiting = Recorded()
    waiting.ask(b"GET http://blog/x HTTP/1.1\r\n\r\n")
    (entry,) = entries(waiting)
    assert (entry["response"]["status"], entry["request"]["url"]) == (0, "http://blog/x")
    other = Recorded()
    other.ask(b"\x16\x03")
    assert entries(other) == []


def test_har_has_the_messages_of_websockets() -> None:
    made = opened()
    made.reply(frame(1, b"hello") + frame(2, b"\x00"))
    (entry,) = entries(made)
    assert [(one["type"], one["data"]) for one in entry["_webSocketMessages"]] == [
        ("receive", "hello"),
        ("receive", "AA=="),
    ]
