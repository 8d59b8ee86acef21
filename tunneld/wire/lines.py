"""The control protocol as bytes: requests, replies and the lines they travel in. Pure. Described for people in
tunneld-control(7).

    request     verb [argument ...] [key=value ...]        quoted as in a shell: name="my server", name='my server'
    reply       any number of items, then one verdict
    item        * key=value key="value with blanks"        a quoted value is a JSON string (RFC 8259 §7)
    verdict     OK [text]   |   ERR code text

Requests are typed by people, hence the shell's rules; replies are read by programs, hence JSON's, which every
language can undo. Nothing that arrives as a value can end a line early: requests refuse control characters, items
escape whatever does not print (controls, line separators, direction marks) reversibly, and the free text of verdicts
gets U+FFFD in its place.

Octets in, lines out, in bounded memory. Pure.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tunneld.errors import LocalProtocolError, RemoteProtocolError, UsageError

MAX_LINE = 4096
"""Octets of a request without its line end: as many as Linux lets a person type into a line of a terminal
(N_TTY_BUF_SIZE). The longest honest one has about 300.
"""

MAX_REPLY_LINE = 16 * MAX_LINE
"""Octets of a reply line: JSON writes one octet of a value as at most six, and an item may repeat what a request
said.
"""

Value = str | int | float | bool | None
Item = Mapping[str, Value]
"""One reply line. On the wire True and False are `yes` and `no`, and a key whose value is None is left out."""

_VERB = re.compile(r"[a-z][a-z0-9_-]*")
_KEY = re.compile(r"[a-z_][a-z0-9_]*")
_CODE = re.compile(r"[a-z][a-z0-9-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # C0 without tab, DEL, C1
_PAIR = re.compile(r'(?P<key>[a-z_][a-z0-9_]*)=(?P<value>"(?:[^"\\]|\\.)*"|[^\s"\\]*)(?: |\Z)')


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asks for. `verb` is lower case; every `options` key is an identifier."""

    verb: str
    args: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ItemLine:
    """One `*` line of a reply; every value is a string by now."""

    item: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ok:
    """The last line of a reply that went well."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class Err:
    """The last line of a reply that did not; `code` is one of `tunneld.errors`."""

    code: str
    text: str = ""


ReplyLine = ItemLine | Ok | Err


def parse_request(line: bytes) -> Request:
    """Read one request line, with or without its line end. Raises `UsageError` that says what to do instead."""
    words = _split(_decode(line))
    verb = words[0].lower()
    if not _VERB.fullmatch(verb):
        raise UsageError(f"not a verb: {_excerpt(words[0])}; start the line with one of those that help lists")
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
    return Request(verb, tuple(args), options)


def format_request(request: Request) -> bytes:
    """Write one request line that `parse_request` reads back. Raises `UsageError` for what a request cannot carry."""
    if not _VERB.fullmatch(request.verb.lower()):
        raise UsageError(f"not a verb: {_excerpt(request.verb)}")
    words = [request.verb, *(_positional(arg) for arg in request.args)]
    words += [f"{_identifier(key)}={shlex.quote(value)}" for key, value in request.options.items()]
    text = " ".join(words)
    if _CONTROL.search(text) or "\t" in text:
        raise UsageError(f"control characters cannot be sent: {_excerpt(text)}")
    try:
        line = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: what Python makes of a command line that is not UTF-8
        raise UsageError(f"only UTF-8 can be sent: {_excerpt(text)}") from None
    if len(line) > MAX_LINE:
        raise UsageError(f"request of {len(line)} octets is longer than {MAX_LINE}; shorten it")
    return line + b"\n"


def format_item(item: Item) -> bytes:
    """Write one `*` line. Raises `LocalProtocolError` where a key is no identifier or the line would be too long to
    be read.
    """
    if not all(map(_KEY.fullmatch, item)):
        raise LocalProtocolError(f"not all keys of an item are made of a-z, 0-9 and _: {_excerpt(' '.join(item))}")
    pairs = [f"{key}={_quote(_text(value))}" for key, value in item.items() if value is not None]
    line = " ".join(["*", *pairs]).encode()
    if len(line) > MAX_REPLY_LINE:
        raise LocalProtocolError(
            f"item of {len(line)} octets is longer than {MAX_REPLY_LINE}: {_excerpt(' '.join(item))}"
        )
    return line + b"\n"


def format_ok(text: str = "") -> bytes:
    """Write the `OK` line; `text` is cut where the line would be too long."""
    return _verdict("OK", text)


def format_err(code: str, text: str) -> bytes:
    """Write the `ERR` line; `text` is cut where the line would be too long. Raises `LocalProtocolError` for an odd
    code.
    """
    if not _CODE.fullmatch(code):
        raise LocalProtocolError(f"not an error code: {_excerpt(code)}")
    return _verdict(f"ERR {code}", text)


def parse_reply(line: bytes) -> ReplyLine:
    """Read one reply line, with or without its line end. Raises `RemoteProtocolError`."""
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"reply is not UTF-8: octet {error.start} is 0x{line[error.start]:02x}") from None
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
        raise UsageError(f"line is not UTF-8: octet {error.start} is 0x{line[error.start]:02x}; send UTF-8") from None
    if control := _CONTROL.search(text):
        raise UsageError(f"line has the control character U+{ord(control[0]):04X}; send printable text")
    return text


def _split(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        what = "a backslash with nothing behind it" if "escaped" in str(error) else "an unclosed quote"
        raise UsageError(f"line ends in {what}; quote as in a shell: name='my server'") from None
    if not words:
        raise UsageError("line is empty; type help for the verbs")
    if any("\t" in word for word in words):
        raise UsageError("line has a tab inside quotes; send printable text")
    return words


def _positional(arg: str) -> str:
    key, equals, _ = arg.partition("=")
    if equals and _KEY.fullmatch(key):
        raise UsageError(f"argument {_excerpt(arg)} would be read as the option {key}; give it as one")
    return shlex.quote(arg)


def _identifier(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise UsageError(f"not the name of an option: {_excerpt(key)}; it is made of a-z, 0-9 and _")
    return key


def _verdict(head: str, text: str) -> bytes:
    printable = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:MAX_REPLY_LINE])
    room = MAX_REPLY_LINE - len(head) - 1
    cut = printable.encode()[:room].decode(errors="ignore")
    return f"{head} {cut}\n".encode() if cut else f"{head}\n".encode()


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _quote(text: str) -> str:
    if text and text.isprintable() and not any(char in ' "\\' for char in text):
        return text
    return "".join(_escaped(json.dumps(text, ensure_ascii=False)))


def _escaped(text: str) -> Iterable[str]:
    """JSON may write any character as escapes (RFC 8259 §7); we do so for each that does not print."""
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
    """At most 60 characters of something unfit, in a form that is safe to show."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


class LineBuffer:
    """Cuts a stream into lines.

    `feed` what arrived, then take lines until `next_line` has none; whoever reads from the network only when there is
    none holds at most one unfinished line and one read. Lines stay octets inside, so a pipelined flood costs what it
    weighs and no more.
    """

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._octets = bytearray()
        self._scanned = 0  # no line end lies before this, so a line that comes octet by octet is searched once

    def __len__(self) -> int:
        """Octets held: at most one line and one read."""
        return len(self._octets)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add what arrived."""
        self._octets += data

    def next_line(self) -> bytes | None:
        """Take the next whole line, without its LF or CRLF; None when none is complete.

        Raises `RemoteProtocolError` when the next line is longer than the limit, complete or not, and then for good:
        feed no more.
        """
        end = self._octets.find(b"\n", self._scanned)
        self._scanned = len(self._octets) if end < 0 else 0
        line = bytes(self._octets[: end if end >= 0 else self._limit + 2]).removesuffix(b"\r")
        if len(line) > self._limit:
            self._scanned = 0
            raise RemoteProtocolError(
                f"line is longer than {self._limit} octets; send shorter ones, each with a line end"
            )
        if end < 0:
            return None
        del self._octets[: end + 1]
        return line
