"""How many strangers there may be: `control.max_startups`, as sshd_config(5) writes `MaxStartups`. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from tunneld.config.literals import literal

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
