"""The control protocol's codec: requests, replies, and the lines they are sent in. Pure. tunneld-control(7) is its
reference for users.

    request     verb [argument ...] [key=value ...]        quoted as in a shell: name="my server", name='my server'
    reply       any number of items, then one verdict
    item        * key=value key="value with blanks"        a quoted value is a JSON string (RFC 8259 §7)
    verdict     OK [text]   |   ERR code text

People type requests, hence the shell's quoting; programs read replies, hence JSON's, which every language can decode.
No value can end a line early: requests with control characters are refused, items escape whatever does not print
(controls, line separators, direction marks) reversibly, and the free text of verdicts gets U+FFFD in its place.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tunneld.errors import LocalProtocolError, RemoteProtocolError, UsageError

MAX_LINE = 4096
"""Bytes of a request without its line end: as many as fit into one line typed at a Linux terminal (N_TTY_BUF_SIZE). The
longest honest request has about 300.
"""

MAX_REPLY_LINE = 16 * MAX_LINE
"""Bytes of a reply line: an item may repeat the values of a request, and JSON needs at most six bytes for one."""

Value = str | int | float | bool | None
Item = Mapping[str, Value]
"""The values of one reply line. On the wire True and False are `yes` and `no`, and a key whose value is None is
omitted.
"""

_VERB = re.compile(r"[a-z][a-z0-9_-]*")
_PLAIN = re.compile(r'[^ "\\]+')
_KEY = re.compile(r"[a-z_][a-z0-9_]*")
_CODE = re.compile(r"[a-z][a-z0-9-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # C0 without tab, DEL, C1
_PAIR = re.compile(r'(?P<key>[a-z_][a-z0-9_]*)=(?P<value>"(?:[^"\\]|\\.)*"|[^\s"\\]*)(?: |\Z)')


@dataclass(frozen=True, slots=True)
class ControlRequest:
    """One parsed request line. `verb` is lower case; every key of `options` is an identifier."""

    verb: str
    args: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ItemLine:
    """One `*` line of a reply, as the client parses it: every value is a string."""

    item: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ok:
    """The last line of a successful reply."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class Err:
    """The last line of a failed reply; `code` is a wire code of `tunneld.errors`."""

    code: str
    text: str = ""


ReplyLine = ItemLine | Ok | Err


def parse_request(line: bytes) -> ControlRequest:
    """Parse one request line, with or without its line end. Raises `UsageError`, which says what to do instead."""
    words = _split(_decode(line))
    verb = words[0].lower()
    if not _VERB.fullmatch(verb):
        raise UsageError(f"not a verb: {_excerpt(words[0])}; start the line with a verb; help lists them")
    args: list[str] = []
    options: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not (equals and _KEY.fullmatch(key)):
            args.append(word)
        elif key in options:
            raise UsageError(f"option {_excerpt(key)} is given twice; give it once")
        else:
            options[key] = value
    return ControlRequest(verb, tuple(args), options)


def format_request(request: ControlRequest) -> bytes:
    """Format one request line, with its line end. Raises `UsageError` for values that a request cannot contain."""
    if not _VERB.fullmatch(request.verb.lower()):
        raise UsageError(f"not a verb: {_excerpt(request.verb)}")
    words = [request.verb, *(_positional(arg) for arg in request.args)]
    words += [f"{_identifier(key)}={shlex.quote(value)}" for key, value in request.options.items()]
    text = " ".join(words)
    if _CONTROL.search(text) or "\t" in text:
        raise UsageError(f"control characters cannot be sent: {_excerpt(text)}")
    try:
        line = text.encode()
    except UnicodeEncodeError:  # a lone surrogate: how Python represents a command line that is not UTF-8
        raise UsageError(f"only UTF-8 text can be sent: {_excerpt(text)}") from None
    if len(line) > MAX_LINE:
        raise UsageError(f"request of {len(line)} bytes is longer than {MAX_LINE} bytes; shorten it")
    return line + b"\n"


def format_item(item: Item) -> bytes:
    """Format one `*` line, with its line end. Raises `LocalProtocolError` if a key is not an identifier or the line
    exceeds `MAX_REPLY_LINE`.
    """
    if not all(map(_KEY.fullmatch, item)):
        raise LocalProtocolError(f"keys of an item consist of a-z, 0-9 and _: {_excerpt(' '.join(item))}")
    pairs = [f"{key}={_quote(_text(value))}" for key, value in item.items() if value is not None]
    line = " ".join(["*", *pairs]).encode()
    if len(line) > MAX_REPLY_LINE:
        raise LocalProtocolError(
            f"item of {len(line)} bytes is longer than {MAX_REPLY_LINE} bytes: {_excerpt(' '.join(item))}"
        )
    return line + b"\n"


def format_ok(text: str = "") -> bytes:
    """Format the `OK` line; `text` is truncated to `MAX_REPLY_LINE`."""
    return _verdict("OK", text)


def format_err(code: str, text: str) -> bytes:
    """Format the `ERR` line; `text` is truncated to `MAX_REPLY_LINE`. Raises `LocalProtocolError` for a malformed
    code.
    """
    if not _CODE.fullmatch(code):
        raise LocalProtocolError(f"not an error code: {_excerpt(code)}")
    return _verdict(f"ERR {code}", text)


def parse_reply(line: bytes) -> ReplyLine:
    """Parse one reply line, with or without its line end. Raises `RemoteProtocolError`."""
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"reply is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}") from None
    kind, _, rest = text.partition(" ")
    if kind == "*":
        return ItemLine(_parse_pairs(rest))
    if kind == "OK":
        return Ok(rest)
    code, _, explanation = rest.partition(" ")
    if kind == "ERR" and _CODE.fullmatch(code):
        return Err(code, explanation)
    raise RemoteProtocolError(f"not a reply of the control protocol: {_excerpt(text)}")


def _decode(line: bytes) -> str:
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"line is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}; send UTF-8") from None
    if control := _CONTROL.search(text):
        raise UsageError(f"line contains the control character U+{ord(control[0]):04X}; send printable text")
    return text


def _split(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        problem = "a backslash with nothing after it" if "escaped" in str(error) else "an unclosed quote"
        raise UsageError(f"line ends in {problem}; quote as in a shell: name='my server'") from None
    if not words:
        raise UsageError("line is empty; type help for the verbs")
    if any("\t" in word for word in words):
        raise UsageError("line contains a tab inside quotes; send printable text")
    return words


def _positional(arg: str) -> str:
    key, equals, _ = arg.partition("=")
    if equals and _KEY.fullmatch(key):
        raise UsageError(f"argument {_excerpt(arg)} would be parsed as the option {key}; pass it as an option")
    return shlex.quote(arg)


def _identifier(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise UsageError(f"not an option name: {_excerpt(key)}; names consist of a-z, 0-9 and _")
    return key


def _verdict(head: str, text: str) -> bytes:
    printable = text = text[:MAX_REPLY_LINE]
    if not text.isprintable():
        printable = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    limit = MAX_REPLY_LINE - len(head) - 1
    truncated = printable.encode()[:limit].decode(errors="ignore")
    return f"{head} {truncated}\n".encode() if truncated else f"{head}\n".encode()


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _quote(text: str) -> str:
    if text.isprintable() and _PLAIN.fullmatch(text):
        return text
    return "".join(_escaped(json.dumps(text, ensure_ascii=False)))


def _escaped(text: str) -> Iterable[str]:
    """Escape what does not print: JSON allows an escape for any character (RFC 8259 §7)."""
    return (char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _parse_pairs(text: str) -> Mapping[str, str]:
    item: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _PAIR.match(text, position)
        if match is None or match["key"] in item:
            raise RemoteProtocolError(f"not an item of key=value pairs, each key once: {_excerpt(text[position:])}")
        item[match["key"]] = _unquote(match["value"])
        position = match.end()
    return item


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        raise RemoteProtocolError(f"quoted value is not a JSON string: {_excerpt(value)}") from None


def _excerpt(text: str) -> str:
    """At most 60 characters of invalid input, in a form that is safe to show."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


class LineBuffer:
    """Splits a byte stream into lines.

    `feed` the bytes that arrived, then call `next_line` until it returns None. A caller that reads from the network
    only then buffers at most one unfinished line and one read. Lines are kept as bytes, so a flood of pipelined
    requests needs no more memory than its size.
    """

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0  # there is no line end before this, so a line that arrives byte by byte is searched once

    def __len__(self) -> int:
        """Buffered bytes: at most one line and one read."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes that arrived."""
        self._buffer += data

    def take_rest(self) -> bytes:
        """Remove and return everything: what follows is not lines."""
        rest, self._buffer, self._scanned = bytes(self._buffer), bytearray(), 0
        return rest

    def next_line(self) -> bytes | None:
        """Remove and return the next complete line, without its LF or CRLF; None if there is none.

        Raises `RemoteProtocolError` if the next line is longer than the limit, complete or not. Every later call raises
        too; do not feed more.
        """
        end = self._buffer.find(b"\n", self._scanned)
        self._scanned = len(self._buffer) if end < 0 else 0
        line = bytes(self._buffer[: end if end >= 0 else self._limit + 2]).removesuffix(b"\r")
        if len(line) > self._limit:
            self._scanned = 0
            raise RemoteProtocolError(
                f"line is longer than {self._limit} bytes; send shorter lines, each with a line end"
            )
        if end < 0:
            return None
        del self._buffer[: end + 1]
        return line
