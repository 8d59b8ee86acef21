"""Exchanges for other tools: a curl command, and a HAR file (HTTP Archive 1.2) for browsers and proxies."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl

from tunneld import __version__
from tunneld.inspector.content import content_of
from tunneld.inspector.records import Exchange, Headers, SeenMessage, SeenRequest, SeenResponse
from tunneld.inspector.redaction import hide_target
from tunneld.inspector.views import shown_headers

MADE_BY_CURL = frozenset(("host", "content-length", "connection", "transfer-encoding", "expect", "accept-encoding"))
"""Fields that curl sets by itself, or that would change how it reads the answer."""


def curl_command(exchange: Exchange, base: str, *, reveal: bool) -> str:
    """A command that sends the request again, to the local server at `base` (`http://127.0.0.1:8000`)."""
    request = exchange.request
    if request is None:
        raise ValueError("this is no request")
    target = request.target if reveal else hide_target(request.target)
    path = target if target.startswith("/") else "/" + target.partition("://")[2].partition("/")[2]
    words = ["curl", "-i"]
    if request.method == "HEAD":
        words.append("--head")
    elif request.method != ("POST" if request.body else "GET"):
        words += ["-X", request.method]
    for name, value in shown_headers(request.headers, reveal=reveal):
        if name.lower() == "host":
            words += ["-H", f"Host: {value}"]
        elif name.lower() == "accept-encoding":
            words.append("--compressed")
        elif name.lower() not in MADE_BY_CURL:
            words += ["-H", f"{name}: {value}" if value else f"{name};"]
    if not request.body:
        return shlex.join([*words, base + path])
    body, warning = bytes(request.body), ""
    if not request.is_whole:
        warning = f"# only {len(body)} of {request.size} bytes of the body\n"
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = "\0"
    if text.replace("\n", "").replace("\t", "").isprintable():
        return warning + shlex.join([*words, "--data-raw", text, base + path])
    encoded = base64.b64encode(body).decode()
    return f"{warning}echo {encoded} | base64 -d | {shlex.join([*words, '--data-binary', '@-', base + path])}"


def har_of(exchanges: Iterable[Exchange], decoded: int, *, reveal: bool) -> dict[str, Any]:
    """A HAR file with these exchanges; connections that are not HTTP are left out."""
    entries = [har_entry(exchange, decoded, reveal=reveal) for exchange in exchanges if exchange.request is not None]
    return har_file(entries)


def har_file(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A HAR file with these entries."""
    return {
        "log": {"version": "1.2", "creator": {"name": "tunneld", "version": __version__}, "entries": entries},
    }


def har_entry(exchange: Exchange, decoded: int, *, reveal: bool) -> dict[str, Any]:
    """One entry."""
    request, response = exchange.request, exchange.response
    assert request is not None
    ended = exchange.ended if exchange.ended is not None else (response.began if response else exchange.began)
    sent = request.ended if request.ended is not None else exchange.began
    first = response.began if response else ended
    send = max(0.0, min(sent, first) - exchange.began)
    wait, receive = max(0.0, first - exchange.began - send), max(0.0, ended - first)
    entry = {
        "startedDateTime": datetime.fromtimestamp(exchange.began, UTC).isoformat(timespec="milliseconds"),
        "time": _milliseconds(send) + _milliseconds(wait) + _milliseconds(receive),
        "request": _request(request, decoded, reveal=reveal),
        "response": _response(response, decoded, reveal=reveal),
        "cache": {},
        "timings": {"send": _milliseconds(send), "wait": _milliseconds(wait), "receive": _milliseconds(receive)},
        "comment": exchange.note,
    }
    if exchange.frames:
        entry["_webSocketMessages"] = [
            {
                "type": "send" if frame.is_request else "receive",
                "time": frame.time,
                "opcode": frame.opcode,
                "data": frame.data.decode("utf-8", "replace")
                if frame.opcode == 1
                else base64.b64encode(frame.data).decode(),
            }
            for frame in exchange.frames
        ]
    return entry


def _request(request: SeenRequest, decoded: int, *, reveal: bool) -> dict[str, Any]:
    headers = shown_headers(request.headers, reveal=reveal)
    target = request.target if reveal else hide_target(request.target)
    host = request.header("host") or "localhost"
    made: dict[str, Any] = {
        "method": request.method,
        "url": f"http://{host}{target}" if target.startswith("/") else target,
        "httpVersion": f"HTTP/{request.version}",
        "cookies": [cookie for name, value in headers if name.lower() == "cookie" for cookie in _cookies(value)],
        "headers": _pairs(headers),
        "queryString": _pairs(parse_qsl(target.partition("?")[2], keep_blank_values=True)),
        "headersSize": _size(headers, f"{request.method} {request.target} HTTP/{request.version}"),
        "bodySize": request.size,
    }
    if request.size:
        content = content_of(request, decoded)
        media = request.header("content-type")
        if content.kind == "form":
            parameters = parse_qsl(content.text or "", keep_blank_values=True)
            made["postData"] = {"mimeType": media, "params": _pairs(parameters), "text": ""}
        else:
            text = content.text if content.text is not None else base64.b64encode(content.data).decode()
            comment = content.note if content.text is not None else f"text is base64; {content.note}".rstrip("; ")
            made["postData"] = {"mimeType": media, "params": [], "text": text, "comment": comment}
    return made


def _response(response: SeenResponse | None, decoded: int, *, reveal: bool) -> dict[str, Any]:
    if response is None:  # as browsers write it
        response = SeenResponse("1.1", [], 0.0)
    headers = shown_headers(response.headers, reveal=reveal)
    content = content_of(response, decoded)
    shown: dict[str, Any] = {
        "size": len(content.data) if response.is_whole else response.size,
        "mimeType": response.header("content-type"),
        "comment": content.note,
    }
    if content.text is not None:
        shown["text"] = content.text
    else:
        shown |= {"text": base64.b64encode(content.data).decode(), "encoding": "base64"}
    return {
        "status": response.status,
        "statusText": response.reason,
        "httpVersion": f"HTTP/{response.version}",
        "cookies": [
            _cookies(value.partition(";")[0])[0] for name, value in headers if name.lower() == "set-cookie" and value
        ],
        "headers": _pairs(headers),
        "content": shown,
        "redirectURL": _shown_location(response, reveal=reveal),
        "headersSize": _size(headers, f"HTTP/{response.version} {response.status} {response.reason}"),
        "bodySize": response.size,
    }


def _shown_location(message: SeenMessage, *, reveal: bool) -> str:
    location = message.header("location")
    return location if reveal else hide_target(location)


def _cookies(value: str) -> list[dict[str, str]]:
    pairs = (pair.strip().partition("=") for pair in value.split(";"))
    return [{"name": name, "value": content} for name, _, content in pairs]


def _pairs(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in pairs]


def _size(headers: Headers, start: str) -> int:
    return len(start) + 4 + sum(len(name) + len(value) + 4 for name, value in headers)


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
