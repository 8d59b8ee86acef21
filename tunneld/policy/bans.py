"""Networks that an administrator keeps out for a while. Pure: time is an argument.

A ban applies to visitors of all tunnels, and to connections that have not authenticated. It always ends: networks that
are to stay out belong in the configuration (`tunnels.deny_from`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunneld.errors import LimitReachedError
from tunneld.net.endpoint import Network
from tunneld.policy.networks import NetworkSet, read_address

MAX_BANS = 1000
"""Networks: an administrator types each of them."""
MAX_BAN_TIME = 30 * 86400.0
"""Seconds. A longer ban is a matter for the configuration."""


@dataclass(frozen=True, slots=True)
class Ban:
    """A ban in force."""

    network: Network
    left: float  # seconds


class Bans:
    """The bans of one relay."""

    def __init__(self) -> None:
        self.ends: dict[Network, float] = {}  # empty while nothing is banned, which every visitor's way asks
        self._networks = NetworkSet(())
        self._next_end = 0.0

    def add(self, network: Network, end: float) -> None:
        """Ban a network until `end` (seconds of the caller's clock), also where it is banned already. Raises
        `LimitReachedError`.
        """
        if network not in self.ends and len(self.ends) >= MAX_BANS:
            raise LimitReachedError(f"{MAX_BANS} networks are banned already; lift some with unban")
        self.ends[network] = end
        self._renew()

    def lift(self, network: Network) -> bool:
        """End a ban. Returns whether there was one."""
        if self.ends.pop(network, None) is None:
            return False
        self._renew()
        return True

    def covers(self, host: str, now: float) -> bool:
        """Whether the address `host` is banned at `now`; False for what is no address, such as a Unix socket."""
        if not self.ends:
            return False
        self._expire(now)
        try:
            return read_address(host) in self._networks
        except ValueError:
            return False

    def report(self, now: float) -> Iterator[Ban]:
        """All bans in force, the oldest first."""
        self._expire(now)
        return (Ban(network, end - now) for network, end in self.ends.items())

    def _expire(self, now: float) -> None:
        if self.ends and now >= self._next_end:
            self.ends = {network: end for network, end in self.ends.items() if end > now}
            self._renew()

    def _renew(self) -> None:
        self._networks = NetworkSet(self.ends)
        self._next_end = min(self.ends.values(), default=0.0)
