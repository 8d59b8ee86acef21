"""The JSON with which the page asks for a replay."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from tunneld.errors import UsageError
from tunneld.inspector.records import Headers
from tunneld.inspector.replay import Edits

MAX_FIELDS = 200
"""Header fields of an edited request: servers refuse more than 100."""


def edits_of(body: bytes) -> tuple[int, Edits]:
    """The id of the exchange to replay, and the edits:

        {"id": 7, "method": "POST", "target": "/x", "headers": [["Accept", "*/*"]], "text": "..." or "base64": "..."}

    Only the id is required. Raises `UsageError`.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("the request is not JSON") from None
    if not isinstance(value, dict) or type(value.get("id")) is not int:
        raise UsageError("the request has no id")
    return value["id"], Edits(_text(value, "method"), _text(value, "target"), _headers(value), _body(value))


def _text(value: dict[str, Any], key: str) -> str | None:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{key} is not a string")
    return text


def _headers(value: dict[str, Any]) -> Headers | None:
    found = value.get("headers")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) > MAX_FIELDS:
        raise UsageError(f"headers are not a list of at most {MAX_FIELDS} fields")
    headers: Headers = []
    for field in found:
        match field:
            case [str(name), str(content)]:
                headers.append((name.strip(), content.strip()))
            case _:
                raise UsageError("a header field is not a name and a value")
    return headers


def _body(value: dict[str, Any]) -> bytes | None:
    text, encoded = _text(value, "text"), _text(value, "base64")
    if encoded is None:
        return None if text is None else text.encode()
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise UsageError("base64 is not valid") from None
