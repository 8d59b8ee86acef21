"""The options of openTunnel: `key=value` words turned into a value that cannot be wrong. Pure.

`OPTIONS` is the one table of them: the parser, `help openTunnel`, the command line and the man page check all read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tunneld.errors import UsageError
from tunneld.net.endpoint import MAX_PORT, Network, parse_network
from tunneld.policy.networks import parse_networks
from tunneld.policy.rates import Rate

LONGEST = 365 * 24 * 3600.0
"""Seconds. A year: far beyond any use, near enough that every clock arithmetic holds."""

Anywhere = Literal["any"]
ANYWHERE: Anywhere = "any"
Secure = Literal["yes", "key", "no"]
MAX_COUNT = 1_000_000
"""Visitors: what [tunnels] takes for the same keys, and far beyond the descriptors of a process."""
MAX_OCTETS = 10**15
"""Octets: a hundred megabytes a second for four months."""
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
MAX_NAME = 64
"""Characters in a tunnel's name: fits a column of a table, and a DNS label (63) later."""


@dataclass(frozen=True, slots=True)
class TunnelOptions:
    """What the caller of openTunnel asked for. None means: as the relay is configured."""

    persist: bool = False
    secure: Secure = "no"  # "yes": TLS and a key; "key": a key alone
    server_from: Network | Anywhere | None = None  # None: the address that asked, or any that shows a hidden key
    ttl: float | None = None
    idle_timeout: float | None = None
    open_timeout: float | None = None
    pairing_timeout: float | None = None
    linger: float | None = None
    proxy_protocol: str | None = None
    client_port: int | None = None
    name: str = ""
    allow_from: tuple[Network, ...] = ()
    deny_from: tuple[Network, ...] = ()
    max_visitors: int | None = None
    max_per_source: int | None = None
    visitor_rate: Rate | None = None
    bandwidth: int | None = None
    quota: int | None = None
    hide_visitor: bool = False
    share: bool = False
    replace: bool = True

    @classmethod
    def parse(cls, words: Mapping[str, str]) -> TunnelOptions:
        """Read the options of a request. Raises `UsageError` naming the option and what it takes."""
        values: dict[str, Any] = {}
        for key, text in words.items():
            option = OPTIONS.get(key)
            if option is None:
                raise UsageError(f"unrecognized option {key!r}: openTunnel takes {', '.join(OPTIONS)}")
            try:
                values[key] = option.read(text)
            except (UsageError, ValueError) as error:
                raise UsageError(f"option {key}={text!r}: {error}") from None
        return cls(**values)

    def words(self) -> dict[str, str]:
        """The options as a request says them, but for those that are as by default: what `parse` reads."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {key: _written(value) for key, (value, default) in values.items() if value != default}


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table: how its value is read, what it takes, what it is for."""

    read: Callable[[str], Any]
    takes: str
    summary: str


def _boolean(text: str) -> bool:
    try:
        return {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}[text.lower()]
    except KeyError:
        raise ValueError("not yes or no") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("not a number of seconds") from None
    if not (math.isfinite(value) and 0 < value <= LONGEST):
        raise ValueError(f"not between 0 and {LONGEST:.0f} seconds")
    return value


def _server_from(text: str) -> Network | Anywhere:
    return ANYWHERE if text.lower() == ANYWHERE else parse_network(text)


def _secure(text: str) -> Secure:
    match text.lower():
        case "key":
            return "key"
        case _:
            return "yes" if _boolean(text) else "no"


def _proxy_protocol(text: str) -> str:
    if text.lower() not in {"v1", "v2"}:
        raise ValueError("not v1 or v2")
    return text.lower()


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_PORT):
        raise ValueError(f"not a port between 1 and {MAX_PORT}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_COUNT)) and 1 <= int(text) <= MAX_COUNT):
        raise ValueError(f"not a number between 1 and {MAX_COUNT}")
    return int(text)


def _octets(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,16})([kMGT]?)", text)
    octets = int(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= octets <= MAX_OCTETS:
        raise ValueError("not a number of octets from 1 to 1000T; k, M, G and T mean thousands, millions and so on")
    return octets


def _name(text: str) -> str:
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}", text):
        raise ValueError(f"not a name of at most {MAX_NAME} letters, digits, dots, dashes and underscores")
    return text


OPTIONS: dict[str, Option] = {
    "persist": Option(_boolean, "yes|no", "stay open: each server connection serves one visitor, one after another"),
    "secure": Option(_secure, "yes|key|no", "the hidden server shows a key: in TLS, or without"),
    "server_from": Option(_server_from, "ADDRESS|NETWORK|any", "who may connect as the hidden server"),
    "ttl": Option(_seconds, "SECONDS", "close the tunnel after this time, whatever it does"),
    "idle_timeout": Option(_seconds, "SECONDS", "close the tunnel when no byte has moved for this time"),
    "open_timeout": Option(_seconds, "SECONDS", "close the tunnel when nobody has been connected for this time"),
    "pairing_timeout": Option(_seconds, "SECONDS", "how long a visitor waits for a server connection"),
    "linger": Option(_seconds, "SECONDS", "how long a half-closed relay may be silent"),
    "proxy_protocol": Option(_proxy_protocol, "v1|v2", "tell the hidden server each visitor's address first"),
    "client_port": Option(_port, "PORT", "the port that clients connect to"),
    "name": Option(_name, "NAME", "a word for people, and for whose the address is"),
    "allow_from": Option(parse_networks, "NETWORK[,NETWORK...]", "the only places that visitors may come from"),
    "deny_from": Option(parse_networks, "NETWORK[,NETWORK...]", "places that visitors may not come from, ever"),
    "max_visitors": Option(_count, "COUNT", "how many visitors are relayed at once"),
    "max_per_source": Option(_count, "COUNT", "how many of them from one IPv4 address or IPv6 /64"),
    "visitor_rate": Option(Rate.parse, "N[/s|/m|/h]", "how many new ones from there in a second, minute or hour"),
    "bandwidth": Option(_octets, "OCTETS[k|M|G]", "octets per second, both directions together, shared by visitors"),
    "quota": Option(_octets, "OCTETS[k|M|G|T]", "close the tunnel when so many octets were relayed"),
    "hide_visitor": Option(_boolean, "yes|no", "do not tell the hidden server's ssh where visitors come from"),
    "share": Option(
        _boolean, "yes|no", "join the open tunnel of this name, whose visitors are shared, or open the first"
    ),
    "replace": Option(_boolean, "yes|no", "close the open tunnel of this name, or be refused while that is served"),
}
