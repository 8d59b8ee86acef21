"""Where the inspector listens, and what it keeps. Needs neither Trio nor h11: every agent reads these settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunneld.errors import UsageError
from tunneld.net.endpoint import is_loopback, join_host_port, parse_host_port
from tunneld.policy.options import parse_bytes

KIB = 1024
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 4040
"""Where it listens by default; if the port is taken, any free one."""
INSPECT_PLACE = f"{DEFAULT_HOST}:{DEFAULT_PORT}"
INSPECT_BODY, INSPECT_MEMORY = "64k", "16M"
"""The defaults of what is kept, as they are typed; see `InspectorLimits`."""
LARGEST_BODY = 16_000_000
"""Bytes: what a browser still shows at once."""
LEAST_MEMORY, LARGEST_MEMORY = 1_000_000, 4_000_000_000
"""Bytes: a hundred requests; more than anybody reads, and what a small machine has."""


@dataclass(frozen=True, slots=True)
class InspectorLimits:
    """What the inspector may keep."""

    body: int = 64_000
    """Bytes of each body, and of the frames of a WebSocket in one direction: enough to read, and to edit by hand."""
    memory: int = 16_000_000
    """Bytes of all exchanges; then the oldest goes. 100 bodies of full size, or some 5000 small requests."""
    exchanges: int = 5000
    """Exchanges; a page lists them all."""
    backlog: int = 4 * KIB * KIB
    """Bytes that wait to be parsed; what comes beyond is not copied. A fast transfer of a hundredth of a second."""
    connections: int = 1000
    """Connections parsed at a time, at 5 KiB each, and 100 KiB at worst; further ones are relayed and not shown."""
    frames: int = 1000
    """Frames kept of one WebSocket; then its oldest goes."""
    decoded: int = 1024 * KIB
    """Bytes that a compressed body may grow to in a view."""
    inflaters: int = 200
    """Compressed WebSockets decoded at a time: zlib takes 40 KiB for each direction."""


@dataclass(frozen=True, slots=True)
class InspectSettings:
    """What the user configured."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    is_default: bool = True
    """Whether another port will do."""
    limits: InspectorLimits = field(default_factory=InspectorLimits)

    @property
    def is_public(self) -> bool:
        """Whether other machines may reach it."""
        return not is_loopback(self.host)


def inspect_settings(place: str, body: str, memory: str) -> InspectSettings:
    """What three texts say: `ADDRESS:PORT` or "", and sizes. Raises `UsageError`."""
    limits = InspectorLimits(body=parse_kept_body(body), memory=parse_kept_memory(memory))
    if limits.memory < 4 * limits.body:
        raise UsageError(f"{memory} bytes for all requests are less than four bodies of {body}")
    if not place:
        return InspectSettings(limits=limits)
    host, port = parse_host_port(place)
    return InspectSettings(host, port, is_default=False, limits=limits)


def parse_kept_body(text: str) -> int:
    """Read the bytes kept of a body. Raises `ValueError`."""
    size = parse_bytes(text)
    if size > LARGEST_BODY:
        raise ValueError("more than 16M")
    return size


def parse_kept_memory(text: str) -> int:
    """Read the bytes kept in all. Raises `ValueError`."""
    size = parse_bytes(text)
    if not LEAST_MEMORY <= size <= LARGEST_MEMORY:
        raise ValueError("not between 1M and 4G")
    return size


def parse_inspect(text: str) -> str:
    """Check `ADDRESS:PORT`; returns it. Raises `UsageError`."""
    if text and ":" not in text:
        raise UsageError(
            f"{text!r} is not ADDRESS:PORT, such as {INSPECT_PLACE}; a target goes in front: "
            "tunnel expose TARGET --inspect"
        )
    return join_host_port(*parse_host_port(text)) if text else ""
