"""The types of values in the tables of the schema. Pure.

`Loading` is the validation context of Pydantic while a file is loaded. `Startups` is `control.max_startups`, written as
`MaxStartups` in sshd_config(5).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tunneld.config.salts import PROCESS_KEY
from tunneld.config.wording import literal
from tunneld.errors import UsageError
from tunneld.net.endpoint import MAX_PORT, parse_host, parse_network
from tunneld.policy.rates import Rate


@dataclass(frozen=True, slots=True)
class Loading:
    """The validation context while a file is loaded. Without it nothing is read from the disk."""

    folder: Path  # where relative paths start
    credentials: bool = False  # whether the file has a [[credential]]: [control] and [http] check it
    salt_key: bytes = PROCESS_KEY  # for the verifiers of secrets kept elsewhere, see salts.py


KIB = 1024
MIB = 1024 * KIB
MINUTE = 60.0
HOUR = 60 * MINUTE
DAY = 24 * HOUR
YEAR = 365 * DAY
MILLISECOND = 0.001  # the shortest wait that a scheduler keeps; a smaller value is a mistake


@dataclass(frozen=True, slots=True)
class Restart:
    """Marks a key, or a whole table, that only a restart applies."""


RESTART = Restart()

Seconds = Annotated[float, Field(ge=MILLISECOND, le=YEAR, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, le=YEAR, allow_inf_nan=False)]  # 0: not at all
SpinSeconds = Annotated[float, Field(ge=0, le=0.01, allow_inf_nan=False)]  # 0: not at all; it delays every connection
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
BodySize = Annotated[int, Field(ge=KIB, le=1024 * KIB)]
WindowSize = Annotated[int, Field(ge=64 * KIB, le=1024 * MIB)]
ByteCount = Annotated[int | None, Field(ge=1, le=10**15)]  # None: no limit
File = Annotated[Path, Field(strict=False)]
Folder = Annotated[Path, Field(strict=False)]
ValidatedBool = Annotated[bool, Field(validate_default=True)]


class Table(BaseModel):
    """The base of all tables: unknown keys are refused, types are not converted, values are immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def check_host(value: str) -> str:
    """Check a host to bind or to advertise; an IPv6 address may have brackets."""
    if not value:
        return value
    try:
        if value.replace(".", "").isdigit():
            return str(ipaddress.IPv4Address(value))  # else 300.1.1.1 would be a host name
        return parse_host(f"[{value}]" if ":" in value and not value.startswith("[") else value)
    except (UsageError, ValueError):
        raise ValueError(f"{literal(value)} is not a host name or an address") from None


def check_name(value: str) -> str:
    """Check a host name or address in a list, where an empty one is a mistake."""
    if not value:
        raise ValueError("an empty name matches no request")
    return check_host(value)


def parse_port_range(text: str) -> range:
    """Parse `FIRST-LAST`, a single port, or `0` for any free port. Raises `ValueError`."""
    first, dash, last = text.partition("-")
    if not all(part.isascii() and part.isdigit() for part in (first, last or first)) or (dash and not last):
        raise ValueError(f"{literal(text)} is not a port range; use FIRST-LAST, a single port, or 0")
    if len(first) > len(str(MAX_PORT)) or len(last) > len(str(MAX_PORT)):
        raise ValueError(f"{literal(text)} is not a port range: ports are from 1 to {MAX_PORT}")
    ports = range(int(first), int(last or first) + 1)
    if not ports:
        raise ValueError(f"{literal(text)} is not a port range: {first} is greater than {last}")
    if ports[-1] > MAX_PORT or (ports[0] == 0 and len(ports) > 1):
        raise ValueError(f"{literal(text)} is not a port range: ports are from 1 to {MAX_PORT}")
    return ports


known_port_range = lru_cache(maxsize=16)(parse_port_range)
"""The same, for text that is read again and again."""


MAX_PREAUTH = 1_000_000
"""Unauthenticated connections: as large as any count in the configuration."""

_STARTUPS = re.compile(r"([0-9]{1,7}):([0-9]{1,3}):([0-9]{1,7})")


@dataclass(frozen=True, slots=True)
class Startups:
    """At `start` unauthenticated connections, `rate` percent of new ones are refused, rising to all at `full`."""

    start: int
    rate: int
    full: int

    @classmethod
    def parse(cls, text: str) -> Startups:
        """Parse `START:RATE:FULL`. Raises `ValueError` with a predicate such as "not of the form ..."."""
        if (match := _STARTUPS.fullmatch(text)) is None:
            raise ValueError("not of the form START:RATE:FULL, such as 64:30:128")
        start, rate, full = (int(number) for number in match.groups())
        if not 1 <= start <= full <= MAX_PREAUTH:
            raise ValueError(f"not valid: START must be from 1 to FULL, and FULL at most {MAX_PREAUTH}")
        if not 1 <= rate <= 100:
            raise ValueError("not valid: RATE is a percentage from 1 to 100")
        return cls(start, rate, full)

    def odds(self, unauthenticated: int) -> float:
        """The probability, 0.0 to 1.0, that a new connection is refused when there are so many unauthenticated ones.

        It is 0 below `start`; from there it rises linearly from `rate` percent to 1 at `full`.
        """
        if unauthenticated < self.start:
            return 0.0
        if unauthenticated >= self.full:
            return 1.0
        rate = self.rate / 100
        return rate + (1 - rate) * (unauthenticated - self.start) / (self.full - self.start)

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


NetworkText = Annotated[str, AfterValidator(_network)]
NetworkList = Annotated[tuple[NetworkText, ...], Field(strict=False)]
VisitorRate = Annotated[str, AfterValidator(_rate)]
Reserved = Annotated[int, Field(ge=0, le=1_000_000)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Names = Annotated[tuple[Annotated[str, AfterValidator(check_name)], ...], Field(strict=False)]
