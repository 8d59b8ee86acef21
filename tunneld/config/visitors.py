"""The kinds of values in `[tunnels]` that say which visitors may come."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from tunneld.config.literals import literal
from tunneld.endpoint import parse_network
from tunneld.errors import UsageError
from tunneld.rules.rates import Rate


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
