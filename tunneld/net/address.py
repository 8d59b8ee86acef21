"""The addresses that a tunnel holds and a reservation keeps: what visitors reach it by. Pure.

    20080                a TCP port of the relay
    blog.example.org     a host name on a port that many tunnels share

A UDP port would be a third kind, `20080/udp`: another class here, and a row of `parse_address`. Two addresses are equal
if they print the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunneld.errors import UsageError
from tunneld.net.endpoint import parse_port

MAX_NAME = 253
"""Characters of a host name without the final dot (RFC 1035)."""
_LABEL_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port of the relay."""

    number: int

    def __str__(self) -> str:
        return str(self.number)


@dataclass(frozen=True, slots=True)
class HostName:
    """A host name in lower case, without a final dot. International names are in their ASCII form (`xn--...`)."""

    name: str

    def __str__(self) -> str:
        return self.name


Address = Port | HostName


def parse_address(text: str) -> Address:
    """Parse what `str` of an address prints: a port, or else a host name. Raises `UsageError`."""
    return Port(parse_port(text, text, lowest=1)) if text.isascii() and text.isdigit() else parse_host_name(text)


def parse_host_name(text: str) -> HostName:
    """Parse a host name, in any case, with or without the final dot. Raises `UsageError`, also for IPv4 addresses."""
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > MAX_NAME or labels[-1].isdigit() or not all(map(_LABEL_PATTERN.fullmatch, labels)):
        raise UsageError(f"invalid host name {text!r}: expected letters, digits and hyphens, such as blog.example.org")
    return HostName(name)
