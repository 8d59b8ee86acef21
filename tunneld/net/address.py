"""The addresses that a tunnel holds and a reservation keeps: what visitors reach it by. Pure.

    20080                a TCP port of the relay
    blog.example.org     a host name on a port that many tunnels share
    *.example.org        every host name one label below, unless a tunnel has that name itself
    example.org/api      the requests for a host name below one path, which ends at a `/`: /api is not /apix
    shell@AAECAwQFBgc... the private tunnel with this name of the node with this id; no port is open for it

A UDP port would be a further kind, `20080/udp`: another class here, and a row of `parse_address`. Two addresses are
equal if they print the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tunneld.errors import UsageError
from tunneld.net.endpoint import MAX_PORT, parse_port
from tunneld.net.node_id import NodeId

MAX_NAME = 253
"""Characters of a host name without the final dot (RFC 1035)."""
MAX_PATH = 256
"""Characters of a path: what fits a line of the control protocol beside a host name."""
_LABEL_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_TUNNEL_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PATH_PATTERN = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port of the relay."""

    number: int

    def __str__(self) -> str:
        return str(self.number)


@dataclass(frozen=True, slots=True)
class HostName:
    """A host name in lower case, without a final dot, and perhaps a path. International names are in their ASCII form
    (`xn--...`), as browsers send them.
    """

    name: str
    path: str = ""  # empty, or `/` and segments, without a `/` at the end

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every name one label below."""
        return self.name.startswith("*.")

    def __str__(self) -> str:
        return self.name + self.path


@dataclass(frozen=True, slots=True)
class Private:
    """A private tunnel: a name, and the node whose key it belongs to. Only that node can have the address."""

    node: NodeId
    name: str

    def __str__(self) -> str:
        return f"{self.name}@{self.node}"


Address = Port | HostName | Private


def format_ports(ports: Sequence[int]) -> str:
    """Print ports in their order, with ranges: `20000-20010` or `20000-20001,20007`."""
    runs: list[list[int]] = []
    for port in ports:
        if runs and port == runs[-1][-1] + 1:
            runs[-1].append(port)
        else:
            runs.append([port])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def parse_ports(text: str, maximum: int) -> list[int]:
    """Read what `format_ports` prints: at most `maximum` ports. Raises `ValueError`."""
    ports: list[int] = []
    for word in text.split(","):
        first, _, last = word.partition("-")
        run = range(_port(first), _port(last or first) + 1)
        if not run or len(ports) + len(run) > maximum:
            raise ValueError(f"not a list of at most {maximum} ports")
        ports += run
    return ports


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_PORT)) and 1 <= int(text) <= MAX_PORT):
        raise ValueError(f"{text!r} is not a port")
    return int(text)


def parse_address(text: str) -> Address:
    """Parse what `str` of an address prints: a port, a private tunnel, or else a host name. Raises `UsageError`."""
    if "@" in text:
        return parse_private(text)
    return Port(parse_port(text, text, lowest=1)) if text.isascii() and text.isdigit() else parse_host_name(text)


def parse_host_name(text: str) -> HostName:
    """Parse a host name, in any case, with or without the final dot, perhaps with `*.` in front and a path behind.
    Raises `UsageError`, also for IPv4 addresses.
    """
    host, slash, path = text.partition("/")
    name = host.lower().removesuffix(".")
    labels = name.removeprefix("*.").split(".")
    if not name.isascii():
        raise UsageError(f"host name {text!r} is not in ASCII: write its xn-- form, as browsers send it")
    if len(name) > MAX_NAME or labels[-1].isdigit() or not all(map(_LABEL_PATTERN.fullmatch, labels)):
        raise UsageError(f"invalid host name {text!r}: expected letters, digits and hyphens, such as blog.example.org")
    path = (slash + path).rstrip("/")
    if len(path) > MAX_PATH or not _PATH_PATTERN.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise UsageError(f"invalid path in {text!r}: write it as browsers send it, such as /api")
    return HostName(name, path)


def parse_private(text: str) -> Private:
    """Parse `NAME@ID`. Raises `UsageError`."""
    name, _, node = text.partition("@")
    if not _TUNNEL_NAME_PATTERN.fullmatch(name):
        raise UsageError(f"invalid address of a private tunnel {text!r}: expected NAME@ID, such as shell@AAECAwQF...")
    return Private(NodeId.parse(node), name)
