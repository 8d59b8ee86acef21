"""The kinds of values that the tables of the schema are made of.

Values as a person would write them in TOML, for messages: short, on one line, without control characters.

What the schema may know of the file that is being loaded: the validation context of pydantic.

How many strangers there may be: `control.max_startups`, as sshd_config(5) writes `MaxStartups`. Pure.

The kinds of values in `[tunnels]` that say which visitors may come.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tunneld.errors import UsageError
from tunneld.net.endpoint import MAX_PORT, parse_network
from tunneld.policy.rates import Rate

LONGEST = 60  # characters of a string shown; enough to recognize it, short enough for one line of a terminal
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def literal(value: object) -> str:
    """`"text"`, `true`, `30.0`, `["a", "b"]`; what has no short form is named by its kind: `a table`."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return quote(value)
        case Path():
            return _quoted(str(value))  # whole: its end is what tells one file from another
        case list() | tuple():
            return _array(value)
        case dict():
            return "a table"
        case None:
            return "nothing"
        case int() if abs(value) >= 10**LONGEST:
            return "a number of more than 60 digits"
        case _:
            return str(value)


def quote(text: str) -> str:
    """A string in double quotes, shortened, with everything that does not print escaped."""
    return _quoted(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


def dotted(path: Sequence[str | int]) -> str:
    """A key path as TOML writes it: `control.tls.key`, `tunnels."a b"`, `http.allowed_hosts[0]`."""
    text = ""
    for part in path:
        match part:
            case int():
                text += f"[{part}]"
            case str():
                text += ("." if text else "") + (part if _BARE_KEY.fullmatch(part) else quote(part))
    return text


def _quoted(text: str) -> str:
    return '"' + "".join(_escape(character) for character in text) + '"'


def _array(value: Sequence[object]) -> str:
    if any(isinstance(item, dict) for item in value):
        return "an array of tables"
    whole = "[" + ", ".join(literal(item) for item in value[:LONGEST]) + "]"
    return whole if len(whole) <= LONGEST else "an array"


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"


@dataclass(frozen=True, slots=True)
class Loading:
    """Absent where settings are made by a program: then nothing is read from the disk."""

    folder: Path  # that relative paths start from
    credentials: bool = False  # whether the file has any [[credential]]: a lock of another table asks


KIB = 1024
MIB = 1024 * KIB
MINUTE = 60.0
HOUR = 60 * MINUTE
DAY = 24 * HOUR
YEAR = 365 * DAY
MILLISECOND = 0.001  # the shortest wait a scheduler keeps; nothing below it is meant


@dataclass(frozen=True, slots=True)
class Restart:
    """Marks a key, or a whole table, that a reload cannot apply: its value is in a socket that is already open."""


RESTART = Restart()

Seconds = Annotated[float, Field(ge=MILLISECOND, le=YEAR, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, le=YEAR, allow_inf_nan=False)]  # 0: not at all
Moment = Annotated[float, Field(ge=0, le=0.01, allow_inf_nan=False)]  # everybody waits so long; 0: not at all
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Body = Annotated[int, Field(ge=KIB, le=1024 * KIB)]
Window = Annotated[int, Field(ge=64 * KIB, le=1024 * MIB)]
Octets = Annotated[int | None, Field(ge=1, le=10**15)]  # None: no limit
File = Annotated[Path, Field(strict=False)]
Folder = Annotated[Path, Field(strict=False)]
Guard = Annotated[bool, Field(validate_default=True)]


class Table(BaseModel):
    """What all tables share: unknown keys are refused, types are not guessed, values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def parse_port_range(text: str) -> range:
    """Read `FIRST-LAST`, one port, or `0` for any free port. Raises `ValueError`."""
    first, dash, last = text.partition("-")
    if not all(part.isascii() and part.isdigit() for part in (first, last or first)) or (dash and not last):
        raise ValueError(f"{literal(text)} is not a range of ports: neither FIRST-LAST nor 0")
    if len(first) > len(str(MAX_PORT)) or len(last) > len(str(MAX_PORT)):
        raise ValueError(f"{literal(text)} is not a range of ports: it reaches outside 1-{MAX_PORT}")
    ports = range(int(first), int(last or first) + 1)
    if not ports:
        raise ValueError(f"{literal(text)} is not a range of ports: {first} lies behind {last}")
    if ports[-1] > MAX_PORT or (ports[0] == 0 and len(ports) > 1):
        raise ValueError(f"{literal(text)} is not a range of ports: it reaches outside 1-{MAX_PORT}")
    return ports


MAX_PREAUTH = 1_000_000
"""As many as any count in the configuration may be."""

_STARTUPS = re.compile(r"([0-9]{1,7}):([0-9]{1,3}):([0-9]{1,7})")


@dataclass(frozen=True, slots=True)
class Startups:
    """From `start` strangers on, `rate` percent of newcomers are refused; more as there are more, and at `full` all."""

    start: int
    rate: int
    full: int

    @classmethod
    def parse(cls, text: str) -> Startups:
        """Read `START:RATE:FULL`. Raises `ValueError`."""
        if (match := _STARTUPS.fullmatch(text)) is None:
            raise ValueError("not of the form START:RATE:FULL, such as 64:30:128")
        start, rate, full = (int(number) for number in match.groups())
        if not 1 <= start <= full <= MAX_PREAUTH:
            raise ValueError(f"not in order: START from 1 to FULL, and FULL at most {MAX_PREAUTH}")
        if not 1 <= rate <= 100:
            raise ValueError("not possible: RATE is a percentage from 1 to 100")
        return cls(start, rate, full)

    def odds(self, strangers: int) -> float:
        """How likely a newcomer is refused where there are so many strangers, from 0.0 to 1.0.

        0 below `start`; from there a straight line, from `rate` percent up to 1 at `full`.
        """
        if strangers < self.start:
            return 0.0
        if strangers >= self.full:
            return 1.0
        rate = self.rate / 100
        return rate + (1 - rate) * (strangers - self.start) / (self.full - self.start)

    def __str__(self) -> str:
        return f"{self.start}:{self.rate}:{self.full}"


def _startups(value: str) -> str:
    try:
        return str(Startups.parse(value))
    except ValueError as error:
        raise ValueError(f"{literal(value)} is {error}") from None


MaxStartups = Annotated[str, AfterValidator(_startups)]


def _network(value: str) -> str:
    try:
        return str(parse_network(value))
    except UsageError:
        raise ValueError(f"{literal(value)} is not an address or a network") from None


def _rate(value: str) -> str:
    try:
        return str(Rate.parse(value))
    except ValueError as error:
        raise ValueError(f"{literal(value)} is {error}") from None


NetworkList = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], Field(strict=False)]
VisitorRate = Annotated[str, AfterValidator(_rate)]
