"""Secrets in heads: replaced by a placeholder before anything leaves the inspector, unless the user asks for them.

Bodies are not searched for secrets.
"""

from __future__ import annotations

import re
from typing import Final

from tunneld.inspector.records import Headers

PLACEHOLDER: Final = "[redacted]"
"""What stands for a secret. In a replay it stands for the original value."""
SECRET_HEADERS = frozenset(
    ("authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x-auth-token", "x-csrf-token")
)
SECRET_NAMES = re.compile(
    r"(?:^|[_.-])(?:token|key|secret|password|passwd|pwd|sig|signature|auth|code|session)$", re.IGNORECASE
)
"""Query parameters: `key`, `api_key`, `access-token`, and `apikey` by the next one."""
_JOINED_NAMES = frozenset(("apikey", "accesstoken", "sessionid", "sid", "jwt", "authtoken", "clientsecret"))
_URL_HEADERS = frozenset(("referer", "location", "content-location", "refresh", "x-original-url", "x-rewrite-url"))


def hide_headers(headers: Headers) -> Headers:
    """The same fields without secrets: schemes and the names of cookies stay."""
    return [(name, _hide_header(name.lower(), value)) for name, value in headers]


def hide_target(target: str) -> str:
    """A path or URL without the secrets in its query."""
    start, mark, query = target.partition("?")
    if not mark:
        return target
    query, hash_mark, fragment = query.partition("#")
    return start + mark + "&".join(map(_hide_parameter, query.split("&"))) + hash_mark + fragment


def restore_headers(headers: Headers, original: Headers) -> Headers:
    """Put the original values where an edited field is the redacted one."""
    left = [(name, value, hidden) for (name, value), (_, hidden) in zip(original, hide_headers(original), strict=True)]
    restored: Headers = []
    for name, value in headers:
        for index, (other, secret, hidden) in enumerate(left):
            if PLACEHOLDER in value and value == hidden and name.lower() == other.lower():
                value = secret  # noqa: PLW2901 - the same field, as it was
                del left[index]
                break
        restored.append((name, value))
    return restored


def restore_target(target: str, original: str) -> str:
    """Put the original values where an edited query has redacted ones, parameter by parameter."""
    start, mark, query = target.partition("?")
    values: dict[str, list[str]] = {}
    for parameter in original.partition("?")[2].partition("#")[0].split("&"):
        if _hide_parameter(parameter) != parameter:
            values.setdefault(parameter.partition("=")[0], []).append(parameter)
    parts = []
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        known = values.get(name)
        parts.append(known.pop(0) if value == PLACEHOLDER and known else parameter)
    return start + mark + "&".join(parts)


def _hide_header(name: str, value: str) -> str:
    if name in _URL_HEADERS:
        return hide_target(value)
    if name not in SECRET_HEADERS or not value:
        return value
    if name == "cookie":
        return "; ".join(_hide_pair(pair.strip()) for pair in value.split(";"))
    if name == "set-cookie":
        pair, mark, attributes = value.partition(";")
        return _hide_pair(pair) + mark + attributes
    if name.endswith("authorization") and " " in value:
        return f"{value.partition(' ')[0]} {PLACEHOLDER}"
    return PLACEHOLDER


def _hide_pair(pair: str) -> str:
    name, mark, _ = pair.partition("=")
    return f"{name}={PLACEHOLDER}" if mark else PLACEHOLDER


def _hide_parameter(parameter: str) -> str:
    name, mark, value = parameter.partition("=")
    is_secret = SECRET_NAMES.search(name) or name.lower() in _JOINED_NAMES
    return f"{name}={PLACEHOLDER}" if mark and value and is_secret else parameter
