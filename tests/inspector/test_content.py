"""Bodies: decompressed within a limit, and what they are."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunneld.inspector.content import content_of, text_of
from tunneld.inspector.records import SeenMessage

LIMIT = 10_000


def message(body: bytes, kind: str = "", coding: str = "") -> SeenMessage:
    headers = [("Content-Type", kind), ("Content-Encoding", coding)]
    return SeenMessage("1.1", headers, 0.0, bytearray(body), len(body), ended=1.0)


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (b'{"a": 1}', "application/json", "json"),
        (b'{"a": 1}', "application/problem+json; charset=utf-8", "json"),
        (b'[{"data": null}]', "text/plain", "json"),
        (b'{"a": 1', "application/json", "text"),
        (b"a=1&b=2", "application/x-www-form-urlencoded", "form"),
        (b"\x89PNG\r\n", "image/png", "image"),
        (b"<svg/>", "image/svg+xml", "image"),
        (b"<p>hello", "text/html", "text"),
        (b"\xff\x00\x01", "application/octet-stream", "binary"),
        (b"a\x00b", "text/plain", "binary"),
        (b"[" * 100_000, "application/json", "text"),
        (b"", "application/json", "empty"),
    ],
)
def test_kinds(body: bytes, kind: str, expected: str) -> None:
    assert content_of(message(body, kind), LIMIT).kind == expected


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (gzip.compress(b"hello"), "gzip"),
        (zlib.compress(b"hello"), "deflate"),
        (zlib.compress(b"hello", wbits=-15), "deflate"),
        (gzip.compress(zlib.compress(b"hello")), "deflate, gzip"),
        (b"hello", "identity"),
        (gzip.compress(b"hello")[:-4], "gzip"),  # cut
    ],
)
def test_content_codings(body: bytes, coding: str) -> None:
    content = content_of(message(body, "text/plain", coding), LIMIT)
    assert (content.text, content.note) == ("hello", "")


@pytest.mark.parametrize(
    ("body", "coding", "note"),
    [
        (b"\x0b\x02", "br", "compressed with br, which Python's standard library cannot decompress"),
        (b"no gzip", "gzip", "not valid gzip"),
        (b"x", "gzip, gzip, gzip, gzip", "more than 3 content codings"),
    ],
)
def test_codings_that_cannot_be_removed(body: bytes, coding: str, note: str) -> None:
    assert note in content_of(message(body, "text/plain", coding), LIMIT).note


def test_a_bomb_is_cut() -> None:
    bomb = gzip.compress(gzip.compress(bytes(50_000_000)))
    content = content_of(message(bomb, "text/plain", "gzip, gzip"), LIMIT)
    assert len(content.data) <= LIMIT
    assert "only 10000 decompressed bytes are shown" in content.note


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ("ä".encode("latin-1"), "text/plain; charset=ISO-8859-1", "ä"),
        ("ä".encode("utf-16"), "text/plain", "ä"),
        ("日本".encode("shift_jis"), 'text/html; charset="Shift_JIS"', "日本"),
        ("aä".encode()[:2], "text/plain", "a"),  # cut in the middle of a character
        (b"a", "text/plain; charset=zlib", "a"),
        (b"a", "text/plain; charset=punycode", "a"),
    ],
)
def test_charsets(body: bytes, kind: str, text: str) -> None:
    assert content_of(message(body, kind), LIMIT).text == text


@given(st.binary(max_size=300), st.sampled_from(["", "gzip", "deflate", "br", "zstd"]), st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_nothing_harms(body: bytes, coding: str, kind: str) -> None:
    content_of(message(body, kind, coding), LIMIT)
    text_of(message(body, kind, coding), LIMIT)


def test_zstd_where_python_has_it() -> None:
    zstd = pytest.importorskip("compression.zstd", reason="Python before 3.14 has no zstd")
    assert content_of(message(zstd.compress(b"hello"), "text/plain", "zstd"), LIMIT).text == "hello"
    bomb = content_of(message(zstd.compress(bytes(50_000_000)), "text/plain", "zstd"), LIMIT)
    assert len(bomb.data) <= LIMIT
    assert "only 10000 decompressed bytes are shown" in bomb.note
