"""The kinds of values that the tables of the schema are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tunneld.config.literals import literal
from tunneld.endpoint import MAX_PORT

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
