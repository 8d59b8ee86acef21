"""Exchanges as JSON for the page: a row of the list, and everything about one."""

from __future__ import annotations

import base64
from typing import Any

from tunneld.inspector.content import content_of
from tunneld.inspector.records import Exchange, Headers, SeenFrame, SeenMessage
from tunneld.inspector.redaction import hide_headers, hide_target

OPCODES = {0: "continued", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}


def row_of(exchange: Exchange, *, reveal: bool = False) -> dict[str, Any]:
    """What the list shows."""
    request, response = exchange.request, exchange.response
    target = request.target if request else ""
    size = response.size if response else 0
    return {
        "id": exchange.id,
        "exposure": exchange.exposure,
        "visitor": exchange.visitor,
        "began": exchange.began,
        "duration": None if exchange.ended is None else max(0.0, exchange.ended - exchange.began),
        "method": request.method if request else "",
        "target": target if reveal else hide_target(target),
        "host": request.header("host") if request else "",
        "status": response.status if response else None,
        "type": response.header("content-type").partition(";")[0] if response else "",
        "size": size,
        "upgrade": exchange.upgrade if response else "",
        "frames": exchange.frames_seen,
        "note": exchange.note,
        "replay_of": exchange.replay_of,
    }


def detail_of(exchange: Exchange, decoded: int, *, reveal: bool = False) -> dict[str, Any]:
    """Everything. `decoded`: bytes that a compressed body may grow to."""
    request, response = exchange.request, exchange.response
    return {
        **row_of(exchange, reveal=reveal),
        "interim": exchange.interim,
        "request": request and _message(request, decoded, reveal=reveal),
        "response": response and {**_message(response, decoded, reveal=reveal), "reason": response.reason},
        "wait": response.began - exchange.began if response else None,
        "shown_frames": [_frame(frame) for frame in exchange.frames],
    }


def shown_headers(headers: Headers, *, reveal: bool) -> Headers:
    """Field lines, without secrets unless `reveal`."""
    return headers if reveal else hide_headers(headers)


def _message(message: SeenMessage, decoded: int, *, reveal: bool) -> dict[str, Any]:
    content = content_of(message, decoded)
    return {
        "version": message.version,
        "headers": shown_headers(message.headers, reveal=reveal),
        "trailers": shown_headers(message.trailers, reveal=reveal),
        "size": message.size,
        "is_whole": message.is_whole,
        "is_open": message.ended is None,
        "kind": content.kind,
        "type": message.header("content-type"),
        "text": content.text,
        "data": "" if content.text is not None and content.kind != "image" else _base64(content.data),
        "note": content.note,
    }


def _frame(frame: SeenFrame) -> dict[str, Any]:
    text, data = None, frame.data
    if frame.opcode == 8 and len(data) >= 2:
        text = f"{int.from_bytes(data[:2], 'big')} {data[2:].decode('utf-8', 'replace')}".strip()
    elif not frame.compressed and frame.opcode in {0, 1, 9, 10}:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("utf-8", "replace") if frame.opcode == 1 else None
    return {
        "up": frame.is_request,
        "kind": OPCODES.get(frame.opcode, f"opcode {frame.opcode}"),
        "final": frame.is_final,
        "size": frame.size,
        "kept": len(data),
        "compressed": frame.compressed,
        "time": frame.time,
        "text": text,
        "data": "" if text is not None else _base64(data),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
