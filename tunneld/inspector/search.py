"""The search of the page: words that must all be in an exchange, and conditions.

login status:5xx method:POST      status:404 · type:json · host:blog · is:replay · is:open · is:websocket · -word
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from tunneld.inspector.content import text_of
from tunneld.inspector.records import Exchange, SeenMessage

MAX_QUERY = 500
"""Characters of a search."""
_STATUS = re.compile(r"[1-9](?:xx|[0-9]{2})")
Condition = Callable[[Exchange], bool]


def matcher(query: str, decoded: int) -> Condition:
    """Whether an exchange matches. `decoded`: bytes that a compressed body may grow to. Raises `ValueError`, with a
    sentence.
    """
    if len(query) > MAX_QUERY:
        raise ValueError(f"a search has at most {MAX_QUERY} characters")
    try:
        words = shlex.split(query)
    except ValueError:  # a quote that is still open
        words = query.replace('"', " ").replace("'", " ").replace("\\", " ").split()
    conditions = [_condition(word, decoded) for word in words]
    return lambda exchange: all(condition(exchange) for condition in conditions)


def _condition(word: str, decoded: int) -> Condition:
    if word.startswith("-") and len(word) > 1:
        opposite = _condition(word[1:], decoded)
        return lambda exchange: not opposite(exchange)
    key, mark, value = word.partition(":")
    if mark and key in _KEYS:
        return _KEYS[key](value.lower())
    return _text_condition(word.lower(), decoded)


def _status_condition(value: str) -> Condition:
    if not _STATUS.fullmatch(value):
        raise ValueError("status: takes a number such as 404, or a class such as 5xx")
    digits = value.removesuffix("xx")
    return lambda exchange: exchange.response is not None and str(exchange.response.status).startswith(digits)


def _is_condition(value: str) -> Condition:
    states: dict[str, Condition] = {
        "replay": lambda exchange: exchange.replay_of is not None,
        "open": lambda exchange: exchange.ended is None,
        "websocket": lambda exchange: exchange.upgrade == "websocket",
        "incomplete": lambda exchange: bool(exchange.note),
    }
    if value not in states:
        raise ValueError(f"is: takes one of {', '.join(states)}")
    return states[value]


def _method_condition(value: str) -> Condition:
    return lambda exchange: exchange.request is not None and exchange.request.method.lower() == value


def _type_condition(value: str) -> Condition:
    return lambda exchange: any(value in message.header("content-type").lower() for message in _messages(exchange))


def _host_condition(value: str) -> Condition:
    return lambda exchange: exchange.request is not None and value in exchange.request.header("host").lower()


def _path_condition(value: str) -> Condition:
    return lambda exchange: exchange.request is not None and value in exchange.request.target.lower()


_KEYS: dict[str, Callable[[str], Condition]] = {
    "status": _status_condition,
    "method": _method_condition,
    "type": _type_condition,
    "host": _host_condition,
    "path": _path_condition,
    "is": _is_condition,
}


def _text_condition(word: str, decoded: int) -> Condition:
    def contains(exchange: Exchange) -> bool:
        heads = [exchange.note, exchange.visitor, exchange.exposure]
        if exchange.request is not None:
            heads += [exchange.request.method, exchange.request.target]
        heads += [f"{name}: {value}" for message in _messages(exchange) for name, value in message.headers]
        if any(word in text.lower() for text in heads):
            return True
        if any(word in text_of(message, decoded).lower() for message in _messages(exchange)):
            return True
        encoded = word.encode()
        return any(encoded in frame.data.lower() for frame in exchange.frames)

    return contains


def _messages(exchange: Exchange) -> list[SeenMessage]:
    return [message for message in (exchange.request, exchange.response) if message is not None]
