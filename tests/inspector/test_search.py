"""What a search finds."""

from __future__ import annotations

import gzip

import pytest

from tests.inspector.support import Recorded, recorded
from tunneld.inspector.search import MAX_QUERY, matcher


def exchange() -> Recorded:
    body = gzip.compress(b'{"error": "database is locked"}')
    return recorded(
        b"POST /Orders?x=1 HTTP/1.1\r\nHost: blog.example\r\nContent-Length: 5\r\n\r\nthree",
        b"HTTP/1.1 503 No\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body),
    )


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", True),
        ("orders", True),
        ("locked", True),
        ("three", True),
        ("'is locked'", True),
        ("is locked and", False),
        ("content-type", True),
        ("status:5xx", True),
        ("status:503 method:post", True),
        ("status:4xx", False),
        ("method:GET", False),
        ("type:json", True),
        ("host:blog", True),
        ("path:x=1", True),
        ("-locked", False),
        ("-status:404", True),
        ("is:replay", False),
        ("is:open", False),
        ("is:websocket", False),
        ('"unclosed', False),
        ("http://x", False),
        ("192.0.2.1", True),
    ],
)
def test_queries(query: str, found: bool) -> None:
    assert matcher(query, 1000)(exchange().one) is found


@pytest.mark.parametrize("query", ["status:5", "status:abc", "is:odd", "a" * (MAX_QUERY + 1)])
def test_mistakes(query: str) -> None:
    with pytest.raises(ValueError, match=r"takes|at most"):
        matcher(query, 1000)
