"""What a body is: decompressed as far as its limit, and as text if it is one."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from tunneld.inspector.records import SeenMessage

MAX_CODINGS: Final = 3
"""Content codings on top of each other. Servers use one."""
_IMAGES = frozenset(
    ("image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp", "image/x-icon", "image/svg+xml")
)
_CHARSETS = re.compile(
    r"utf-?8|utf-?16(?:[lb]e)?|us-ascii|ascii|iso-8859-[0-9]{1,2}|latin-?1|windows-125[0-8]|cp125[0-8]|koi8-[ru]"
    r"|shift[_-]jis|euc-(?:jp|kr)|gb2312|gbk|gb18030|big5"
)
"""Charsets of texts. Python knows others, of which some are no charsets or slow."""
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True, slots=True)
class BodyContent:
    """A body to look at."""

    kind: str
    """empty, json, form, image, text or binary."""
    data: bytes
    """The bytes behind the content codings that could be removed."""
    text: str | None
    """The same as text, if it is one."""
    note: str
    """What is missing, or could not be decoded."""


def content_of(message: SeenMessage, limit: int) -> BodyContent:
    """What the body of a message is. `limit`: bytes that it may be decompressed to."""
    data, note = _decoded(bytes(message.body), message.header("content-encoding"), limit)
    if message.lost or message.size > len(message.body):
        cut = f"only the first {len(message.body)} of {message.size} bytes are kept"
        note = f"{cut}; {note}" if note else cut
    if not data:
        return BodyContent("empty", b"", "" if not message.size else None, note)
    media, charset = _media_type(message.header("content-type"))
    if media in _IMAGES:
        return BodyContent("image", data, _text(data, charset) if media == "image/svg+xml" else None, note)
    text = _text(data, charset)
    return BodyContent(_kind(media, data, text), data, text, note)


def text_of(message: SeenMessage, limit: int) -> str:
    """The body as text, for a search; empty if it is none."""
    if not message.body:
        return ""
    data, _ = _decoded(bytes(message.body), message.header("content-encoding"), limit)
    return _text(data, _media_type(message.header("content-type"))[1]) or ""


def _kind(media: str, data: bytes, text: str | None) -> str:
    if text is None:
        return "binary"
    if media == "application/x-www-form-urlencoded" and "=" in text:
        return "form"
    if media.endswith(("/json", "+json")) or text.lstrip()[:1] in {"{", "["}:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return "text"
        return "json"
    return "text"


def _media_type(value: str) -> tuple[str, str]:
    """The media type and the charset in Content-Type."""
    media, *parameters = value.lower().split(";")
    for parameter in parameters:
        name, _, charset = parameter.strip().partition("=")
        if name == "charset":
            return media.strip(), charset.strip('"')
    return media.strip(), ""


def _text(data: bytes, charset: str) -> str | None:
    """The text; None if these bytes are none. The end may be missing, also in the middle of a character."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    if _CHARSETS.fullmatch(charset) and charset.replace("-", "") != "utf8":
        return data.decode(charset, "replace")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data" or not error.start:
            return None
        text = data[: error.start].decode()
    return None if "\0" in text else text


def _decoded(data: bytes, codings: str, limit: int) -> tuple[bytes, str]:
    """Remove the content codings, the last one first. Returns also what could not be."""
    names = [name.strip().lower() for name in codings.split(",") if name.strip()]
    if len(names) > MAX_CODINGS:
        return data, f"more than {MAX_CODINGS} content codings"
    for name in reversed(names):
        if name == "identity" or not data:
            continue
        decode = _DECODERS.get(name)
        if decode is None:
            return data, f"compressed with {name[:20]}, which Python's standard library cannot decompress"
        try:
            data, is_cut = decode(data, limit)
        except Exception as error:  # of several libraries; the bytes are a visitor's or a server's
            return data, f"not valid {name}: {str(error)[:80]}"
        if is_cut:
            return data, f"only {limit} decompressed bytes are shown"
    return data, ""


def _gunzip(data: bytes, limit: int) -> tuple[bytes, bool]:
    return _inflate(data, limit, zlib.MAX_WBITS | 16)


def _undeflate(data: bytes, limit: int) -> tuple[bytes, bool]:
    """`deflate` is zlib by RFC 9110, and without its header in some servers."""
    try:
        return _inflate(data, limit, zlib.MAX_WBITS)
    except zlib.error:
        return _inflate(data, limit, -zlib.MAX_WBITS)


def _inflate(data: bytes, limit: int, window: int) -> tuple[bytes, bool]:
    decoder = zlib.decompressobj(window)
    out = decoder.decompress(data, limit)
    return out, bool(decoder.unconsumed_tail)


def _unzstd(data: bytes, limit: int) -> tuple[bytes, bool]:
    zstd: Any = import_module("compression.zstd")  # Python 3.14
    decoder = zstd.ZstdDecompressor()
    out: bytes = decoder.decompress(data, max_length=limit)
    return out, not decoder.needs_input and not decoder.eof


def _decoders() -> dict[str, Any]:
    made: dict[str, Any] = {"gzip": _gunzip, "x-gzip": _gunzip, "deflate": _undeflate}
    try:
        import_module("compression.zstd")
    except ImportError:
        return made
    return made | {"zstd": _unzstd}


_DECODERS = _decoders()
