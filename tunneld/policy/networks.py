"""Addresses as numbers, and networks as sets of them. Pure.

IPv4-mapped IPv6 addresses (`::ffff:192.0.2.1`), as some people write them, count as the IPv4 addresses that they stand
for. So no list can be evaded by another spelling of an address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from tunneld.net.endpoint import Network, parse_network

MAX_NETWORKS = 256
"""Networks in one option: about as many as fit a line of the control protocol, so HTTP accepts no more either."""

_V4_IN_V6 = ipaddress.IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True, slots=True)
class Address:
    """An address as numbers."""

    version: int
    number: int
    source: int  # the same number for all addresses of one source; negative for IPv6

    @property
    def is_loopback(self) -> bool:
        """Whether it is of this machine only."""
        return self.number >> 24 == 127 if self.version == 4 else self.number == 1


@lru_cache(maxsize=4096)  # visitors return, and parsing takes some µs; 4096 entries are about 1 MiB
def read_address(host: str) -> Address:
    """The numbers of an IPv4 or IPv6 address, as `accept` or a PROXY protocol header gives it. Raises `ValueError`."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return Address(6, int(address), ~(int(address) >> 64))
        address = address.ipv4_mapped
    return Address(4, int(address), int(address))


def source_text(source: int) -> str:
    """The address of a source (`Address.source`), or for IPv6 its network: `2001:db8::/64`."""
    if source >= 0:
        return str(ipaddress.IPv4Address(source))
    return str(ipaddress.IPv6Network((~source << 64, 64)))


class NetworkSet:
    """A set of networks. The cost of a look-up grows with the number of prefix lengths, not of networks."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._prefixes: dict[tuple[int, int], set[int]] = {}
        for network in map(_unmap_network, networks):
            shift = network.max_prefixlen - network.prefixlen
            self._prefixes.setdefault((network.version, shift), set()).add(int(network.network_address) >> shift)

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    def __contains__(self, address: Address) -> bool:
        return any(
            version == address.version and address.number >> shift in prefixes
            for (version, shift), prefixes in self._prefixes.items()
        )


class ConfiguredNetworks:
    """The networks of a setting, read again when a reload has changed it."""

    def __init__(self, texts: Callable[[], tuple[str, ...]]) -> None:
        self._texts = texts
        self._read: tuple[str, ...] = ()
        self._networks = NetworkSet(())

    @property
    def networks(self) -> NetworkSet:
        """What the setting says now."""
        texts = self._texts()
        if texts is not self._read:
            self._read = texts
            self._networks = NetworkSet(map(parse_network, texts))
        return self._networks

    def __contains__(self, host: str) -> bool:
        networks = self.networks
        return bool(networks) and read_address(host) in networks


def _unmap_network(network: Network) -> Network:
    """The IPv4 network inside an IPv4-mapped one (`::ffff:192.0.2.0/120`); any other network unchanged."""
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_V4_IN_V6):
        first = ipaddress.IPv4Address(int(network.network_address) & 0xFFFFFFFF)
        return ipaddress.IPv4Network((first, network.prefixlen - 96))
    return network


def parse_networks(text: str) -> tuple[Network, ...]:
    """Read `192.0.2.0/24,2001:db8::/32,...`. Raises `UsageError` or `ValueError`."""
    words = text.split(",")
    if len(words) > MAX_NETWORKS:
        raise ValueError(f"more than {MAX_NETWORKS} networks")
    return tuple(parse_network(word.strip()) for word in words)
