"""Addresses of nodes: the strategies by which a node can be reached, and which of two strategies is better. Pure.

    address   {'connection strategies': [S, ...], 'sequence num': n [, 'services', 'broker version', 'platform',
               'dynamic pricing', 'seconds to live']}; also the body of `hello`
    crypto    'pubkey', 'lowerstrategy' (one of the others) [, 'broker id', 'comm strat sequence num']
    TCP       'IP address', 'port number' (a decimal string)
    relay     'relayer id'
    pickup    nothing: the node fetches its messages itself

The type of a strategy is its 'comm strategy type'. `Crypto` and `Relay` are accepted as well; `Pickup` is not, because
of a misplaced bracket in the original, which a peer of that time can therefore not send either. Strategies of other
types in an address are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TypeAlias

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.fields import Dictionary, as_dictionary, dictionary_at, id_at, integer_at, list_at, octets_at
from tunneld.wire.egtp.ids import id_of, to_sixbit
from tunneld.wire.mencode import Value, encode

MAX_STRATEGIES = 16
"""Strategies of one address: a node has few, and each may be dialled."""

NO_SEQUENCE = -1
"""The sequence number of a strategy that has none; any other is better."""

_TYPE = b"comm strategy type"
_SEQUENCE = b"comm strat sequence num"
_PORT = re.compile(rb"[1-9][0-9]{0,4}")


class UnknownStrategyError(RemoteProtocolError):
    """A strategy of a type that is not known."""


@dataclass(frozen=True, slots=True)
class TcpStrategy:
    """Dial this IP address and port."""

    host: str
    port: int

    @property
    def is_routable(self) -> bool:
        """Whether the address can be reached from everywhere."""
        return ip_address(self.host).is_global

    def encode(self) -> Value:
        """The value in an address."""
        return {_TYPE: b"TCP", b"IP address": self.host.encode(), b"port number": b"%d" % self.port}


@dataclass(frozen=True, slots=True)
class RelayStrategy:
    """Pass the message to the relay with this id."""

    relay_id: bytes

    def encode(self) -> Value:
        """The value in an address."""
        return {_TYPE: b"relay", b"relayer id": to_sixbit(self.relay_id)}


@dataclass(frozen=True, slots=True)
class PickupStrategy:
    """Keep the message: the node asks for it."""

    def encode(self) -> Value:
        """The value in an address."""
        return {_TYPE: b"pickup"}


LowerStrategy: TypeAlias = TcpStrategy | RelayStrategy | PickupStrategy


@dataclass(frozen=True, slots=True)
class CryptoStrategy:
    """Encrypt for this public key, and send by `lower`. The key is checked by the envelope that uses it."""

    public_key: Dictionary
    lower: LowerStrategy
    sequence: int = NO_SEQUENCE

    @property
    def node_id(self) -> bytes:
        """The id of the node, which is that of its key."""
        return id_of(encode(self.public_key))

    def encode(self) -> Value:
        """The value in an address."""
        fields: Dictionary = {_TYPE: b"crypto", b"pubkey": self.public_key, b"lowerstrategy": self.lower.encode()}
        if self.sequence != NO_SEQUENCE:
            fields[_SEQUENCE] = self.sequence
        return fields


Strategy: TypeAlias = CryptoStrategy | LowerStrategy


def parse_strategy(value: Value) -> Strategy:
    """Parse one strategy. Raises `UnknownStrategyError` for an unknown type, or `RemoteProtocolError`."""
    fields = as_dictionary(value, "a strategy")
    kind = octets_at(fields, _TYPE)
    if kind in (b"crypto", b"Crypto"):
        return _parse_crypto(fields)
    return _parse_lower(fields, kind)


def _parse_crypto(fields: Dictionary) -> CryptoStrategy:
    lower = dictionary_at(fields, b"lowerstrategy")
    strategy = CryptoStrategy(
        dictionary_at(fields, b"pubkey"),
        _parse_lower(lower, octets_at(lower, _TYPE)),
        integer_at(fields, _SEQUENCE, 0, NO_SEQUENCE),
    )
    if b"broker id" in fields and id_at(fields, b"broker id") != strategy.node_id:
        raise RemoteProtocolError("EGTP message: 'broker id' is not the id of 'pubkey'")
    return strategy


def _parse_lower(fields: Dictionary, kind: bytes) -> LowerStrategy:
    if kind == b"TCP":
        return TcpStrategy(_host_in(fields), _port_in(fields))
    if kind in (b"relay", b"Relay"):
        return RelayStrategy(id_at(fields, b"relayer id"))
    if kind == b"pickup":
        return PickupStrategy()
    raise UnknownStrategyError(f"EGTP message: unknown strategy type {ascii(kind[:40])[1:]}")


def _host_in(fields: Dictionary) -> str:
    text = octets_at(fields, b"IP address")
    try:
        return str(ip_address(text.decode("ascii")))
    except ValueError:
        raise RemoteProtocolError(f"EGTP message: {ascii(text[:40])[1:]} is not an IP address") from None


def _port_in(fields: Dictionary) -> int:
    text = octets_at(fields, b"port number")
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise RemoteProtocolError(f"EGTP message: {ascii(text[:40])[1:]} is not a port number")
    return int(text)


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """The address of a node. `details` are the optional keys, as they are."""

    strategies: tuple[Strategy, ...]
    sequence: int
    details: Dictionary = field(default_factory=dict)

    def encode(self) -> Value:
        """The value in messages."""
        return {
            **self.details,
            b"connection strategies": [strategy.encode() for strategy in self.strategies],
            b"sequence num": self.sequence,
        }


def parse_address(value: Value) -> NodeAddress:
    """Parse an address. Raises `RemoteProtocolError`; strategies of unknown types are skipped."""
    fields = as_dictionary(value, "an address")
    strategies = []
    for item in list_at(fields, b"connection strategies", MAX_STRATEGIES):
        try:
            strategies.append(parse_strategy(item))
        except UnknownStrategyError:
            continue
    sequence = integer_at(fields, b"sequence num", 0)
    details = {key: entry for key, entry in fields.items() if key not in (b"connection strategies", b"sequence num")}
    return NodeAddress(tuple(strategies), sequence, details)


def lower_of(strategy: Strategy) -> LowerStrategy:
    """The strategy below the encryption."""
    return strategy.lower if isinstance(strategy, CryptoStrategy) else strategy


def sequence_of(strategy: Strategy) -> int:
    """The sequence number of a strategy."""
    return strategy.sequence if isinstance(strategy, CryptoStrategy) else NO_SEQUENCE


def better(older: Strategy, newer: Strategy, is_open: Callable[[LowerStrategy], bool]) -> Strategy:
    """The better of two strategies for one node; `is_open` tells whether a connection for a strategy is open.

    In this order: an open TCP connection, the higher sequence number, TCP before a relay, a routable IP address, and
    the newer of the two.
    """

    def rank(strategy: Strategy) -> tuple[bool, int, bool, bool]:
        lower = lower_of(strategy)
        is_tcp = isinstance(lower, TcpStrategy)
        routable = isinstance(lower, TcpStrategy) and lower.is_routable
        return is_tcp and is_open(lower), sequence_of(strategy), is_tcp, routable

    return older if rank(older) > rank(newer) else newer
