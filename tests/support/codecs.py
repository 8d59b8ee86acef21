"""Every codec of `tunneld.wire` with one interface: events become bytes, bytes become events. `test_codecs.py` tests
that all of them have the same properties.

To add a codec, add an entry to `CODECS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Protocol

from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError, UsageError
from tunneld.wire.egtp.frames import FrameReader, pack_frame
from tunneld.wire.lines import (
    MAX_LINE,
    MAX_REPLY_LINE,
    ControlRequest,
    Err,
    Item,
    ItemLine,
    LineBuffer,
    Ok,
    format_err,
    format_item,
    format_ok,
    format_request,
    parse_reply,
    parse_request,
)
from tunneld.wire.proxy_protocol import (
    MAX_V1,
    MAX_V2,
    SIGNATURE,
    ProxyHeader,
    decode_v1,
    decode_v2,
    encode_v1,
    encode_v2,
)

Events = list[Any]


class Decoder(Protocol):
    """The receiving half of a codec."""

    def feed(self, data: bytes) -> Events:
        """Return the events that these bytes complete. Not called again after it raised `RemoteProtocolError`."""

    @property
    def held(self) -> int:
        """Number of buffered bytes."""


@dataclass(frozen=True)
class Codec:
    """One codec under test.

    `memory` is the largest number of bytes that its decoder may buffer; `endless` is the beginning of a message that
    never ends.
    """

    name: str
    events: st.SearchStrategy[Any]
    encode: Callable[[Any], bytes]
    decoder: Callable[[], Decoder]
    memory: int
    endless: bytes
    many: bool = True  # False: only one event, at the start of a stream


class LineDecoder:
    """Decodes lines. An invalid request is an event, too, since the connection goes on."""

    def __init__(self, limit: int, parse: Callable[[bytes], Any]) -> None:
        self._lines = LineBuffer(limit)
        self._parse = parse
        self._failure: RemoteProtocolError | None = None

    def feed(self, data: bytes) -> Events:
        if self._failure:
            raise self._failure
        self._lines.feed(data)
        events: Events = []
        try:
            while (line := self._lines.next_line()) is not None:
                events.append(self._parse(line))
        except RemoteProtocolError as error:
            if not events:
                raise
            self._failure = error  # raised with the next bytes, so that the previous events are not lost
        return events

    @property
    def held(self) -> int:
        return 0 if self._failure else len(self._lines)


class HeaderDecoder:
    """Decodes one PROXY protocol header, and ignores what follows."""

    def __init__(self, decode: Callable[[bytes], tuple[ProxyHeader, int] | None]) -> None:
        self._decode = decode
        self._data = b""
        self._done = False

    def feed(self, data: bytes) -> Events:
        if self._done:
            return []
        self._data += data
        if (decoded := self._decode(self._data)) is None:
            return []
        self._done = True
        assert decoded[1] <= len(self._data)
        self._data = b""
        return [decoded[0]]

    @property
    def held(self) -> int:
        return len(self._data)


class FrameDecoder:
    """Decodes EGTP frames of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._reader = FrameReader(limit)
        self._failure: RemoteProtocolError | None = None

    def feed(self, data: bytes) -> Events:
        if self._failure:
            raise self._failure
        self._reader.feed(data)
        events: Events = []
        try:
            while (message := self._reader.next_message()) is not None:
                events.append(message)
        except RemoteProtocolError as error:
            if not events:
                raise
            self._failure = error
        return events

    @property
    def held(self) -> int:
        return 0 if self._failure else len(self._reader)


def parse_or_refuse(line: bytes) -> ControlRequest | str:
    """Parse a request as a server does: return the request, or the message of the error."""
    try:
        return parse_request(line)
    except UsageError as error:
        return str(error)


def identifiers(first: str, rest: str) -> st.SearchStrategy[str]:
    """Names with one alphabet for the first character and another for the rest."""
    return st.builds(str.__add__, st.sampled_from(first), st.text(rest, max_size=12))


LOWER = "abcdefghijklmnopqrstuvwxyz"
keys = identifiers(LOWER + "_", LOWER + "0123456789_")
typeable = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40)
positional = typeable.filter(lambda text: "=" not in text) | st.just("tcp://h:1/?a=b") | st.just("2x=1")
requests = st.builds(
    ControlRequest,
    identifiers(LOWER, LOWER + "0123456789_-"),
    st.lists(positional, max_size=4).map(tuple),
    st.dictionaries(keys, typeable, max_size=4),
)
anything = st.text(max_size=60)
values = anything | st.integers() | st.floats() | st.booleans() | st.none()
items = st.dictionaries(keys, values, max_size=5)
printable = anything.filter(str.isprintable)
codes = identifiers(LOWER, LOWER + "0123456789-")
replies = st.one_of(
    items.map(lambda item: ItemLine(as_received(item))), st.builds(Ok, printable), st.builds(Err, codes, printable)
)


def as_received(item: Item) -> Mapping[str, str]:
    """An item as it is received."""
    words = {True: "yes", False: "no"}
    return {
        key: words[value] if isinstance(value, bool) else str(value) for key, value in item.items() if value is not None
    }


def format_reply(line: ItemLine | Ok | Err) -> bytes:
    """Format a line of a reply."""
    match line:
        case ItemLine(item):
            return format_item(item)
        case Ok(text):
            return format_ok(text)
        case Err(code, text):
            return format_err(code, text)


ports = st.integers(0, 65535)


def both_ends(version: int) -> st.SearchStrategy[ProxyHeader]:
    """Two addresses of one family."""
    octets = 4 if version == 4 else 16
    host = st.binary(min_size=octets, max_size=octets).map(ip_address)
    end = st.tuples(host.filter(lambda ip: not getattr(ip, "ipv4_mapped", None)).map(str), ports)
    return st.builds(ProxyHeader, end, end)


headers = both_ends(4) | both_ends(6) | st.just(ProxyHeader())

CODECS = [
    Codec(
        "requests",
        requests,
        format_request,
        lambda: LineDecoder(MAX_LINE, parse_or_refuse),
        memory=MAX_LINE + 2,
        endless=b"list ",
    ),
    Codec(
        "replies",
        replies,
        format_reply,
        lambda: LineDecoder(MAX_REPLY_LINE, parse_reply),
        memory=MAX_REPLY_LINE + 2,
        endless=b'* key="',
    ),
    Codec(
        "proxy-v1",
        headers,
        lambda header: encode_v1(header.source, header.destination),
        lambda: HeaderDecoder(decode_v1),
        memory=MAX_V1,
        endless=b"PROXY UNKNOWN ",
        many=False,
    ),
    Codec(
        "proxy-v2",
        headers,
        lambda header: encode_v2(header.source, header.destination),
        lambda: HeaderDecoder(decode_v2),
        memory=MAX_V2,
        endless=SIGNATURE + b"\x21\x11\xff\xff",
        many=False,
    ),
    Codec(
        "egtp-frames",
        st.binary(max_size=200),
        pack_frame,
        lambda: FrameDecoder(200),
        memory=204,
        endless=b"\0\0\0\xc9",
    ),
]
