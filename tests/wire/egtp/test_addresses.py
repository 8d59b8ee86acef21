"""Addresses and strategies: round trips, the quirks of the original, which of two is better."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.addresses import (
    CryptoStrategy,
    LowerStrategy,
    NodeAddress,
    PickupStrategy,
    RelayStrategy,
    TcpStrategy,
    UnknownStrategyError,
    better,
    parse_address,
    parse_strategy,
)
from tunneld.wire.egtp.ids import id_of, to_sixbit
from tunneld.wire.mencode import decode, encode

PUBLIC_KEY: Any = {b"key header": {b"type": b"public"}, b"key values": {}}
RELAY = b"R" * 20

lower_strategies = st.one_of(
    st.builds(TcpStrategy, st.ip_addresses().map(str), st.integers(1, 65535)),
    st.builds(RelayStrategy, st.binary(min_size=20, max_size=20)),
    st.just(PickupStrategy()),
)
strategies = lower_strategies | st.builds(CryptoStrategy, st.just(PUBLIC_KEY), lower_strategies, st.integers(-1, 2**40))
addresses = st.builds(
    NodeAddress,
    st.lists(strategies, max_size=4).map(tuple),
    st.integers(0, 2**40),
    st.dictionaries(st.sampled_from([b"services", b"platform"]), st.binary(max_size=4)),
)


@given(addresses)
@settings(max_examples=60)
def test_what_was_encoded_is_parsed(address: NodeAddress) -> None:
    assert parse_address(decode(encode(address.encode()))) == address


def crypto(**changes: Any) -> Any:
    fields = {b"comm strategy type": b"crypto", b"pubkey": PUBLIC_KEY, b"lowerstrategy": tcp()}
    return {**fields, **{name.replace("_", " ").encode(): value for name, value in changes.items()}}


def tcp(host: Any = b"192.0.2.1", port: Any = b"20001") -> Any:
    return {b"comm strategy type": b"TCP", b"IP address": host, b"port number": port}


@pytest.mark.parametrize("kind", [b"crypto", b"Crypto"])
def test_crypto_with_a_capital_is_accepted(kind: bytes) -> None:
    parsed = parse_strategy(crypto(comm_strategy_type=kind, broker_id=to_sixbit(id_of(encode(PUBLIC_KEY)))))
    assert parsed == CryptoStrategy(PUBLIC_KEY, TcpStrategy("192.0.2.1", 20001))
    assert parsed.node_id == id_of(encode(PUBLIC_KEY))


@pytest.mark.parametrize("kind", [b"relay", b"Relay"])
@pytest.mark.parametrize("identity", [RELAY, to_sixbit(RELAY)])
def test_relay_with_a_capital_is_accepted(kind: bytes, identity: bytes) -> None:
    fields: Any = {b"comm strategy type": kind, b"relayer id": identity}
    assert parse_strategy(fields) == RelayStrategy(RELAY)


def test_pickup_with_a_capital_is_refused() -> None:
    assert parse_strategy({b"comm strategy type": b"pickup"}) == PickupStrategy()
    with pytest.raises(UnknownStrategyError, match="'Pickup'"):
        parse_strategy({b"comm strategy type": b"Pickup"})


@pytest.mark.parametrize("kind", [b"tcp", b"CRYPTO", b"", b"carrier pigeon"])
def test_other_types_are_refused_and_skipped_in_an_address(kind: bytes) -> None:
    unknown: Any = {b"comm strategy type": kind}
    with pytest.raises(UnknownStrategyError):
        parse_strategy(unknown)
    parsed = parse_address({b"connection strategies": [unknown, tcp()], b"sequence num": 0})
    assert parsed.strategies == (TcpStrategy("192.0.2.1", 20001),)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "a strategy must be a dictionary"),
        ({}, "'comm strategy type' must be an octet string"),
        (tcp(port=b"0"), "'0' is not a port number"),
        (tcp(port=b"65536"), "is not a port number"),
        (tcp(port=b"080"), "is not a port number"),
        (tcp(port=80), "'port number' must be an octet string"),
        (tcp(host=b"relay.example.org"), "is not an IP address"),
        (tcp(host=b"192.0.2.01"), "is not an IP address"),
        (tcp(host=b"\xff"), "is not an IP address"),
        (crypto(pubkey=b"x"), "'pubkey' must be a dictionary"),
        (crypto(lowerstrategy=None), "'lowerstrategy' must be a dictionary"),
        (crypto(lowerstrategy=crypto()), "unknown strategy type 'crypto'"),
        (crypto(broker_id=RELAY), "'broker id' is not the id of 'pubkey'"),
        (crypto(comm_strat_sequence_num=-2), "'comm strat sequence num' must be an integer"),
        ({b"comm strategy type": b"relay", b"relayer id": b"x"}, "'relayer id' is not an id"),
    ],
)
def test_what_a_strategy_must_have(value: Any, problem: str) -> None:
    with pytest.raises(RemoteProtocolError, match=problem):
        parse_strategy(value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "an address must be a dictionary"),
        ({b"sequence num": 1}, "'connection strategies' must be a list"),
        ({b"connection strategies": [tcp()] * 17, b"sequence num": 1}, "at most 16 items"),
        ({b"connection strategies": []}, "'sequence num' must be an integer"),
        ({b"connection strategies": [], b"sequence num": -1}, "'sequence num' must be an integer of at least 0"),
    ],
)
def test_what_an_address_must_have(value: Any, problem: str) -> None:
    with pytest.raises(RemoteProtocolError, match=problem):
        parse_address(value)


def over(lower: LowerStrategy, sequence: int = 5) -> CryptoStrategy:
    return CryptoStrategy(PUBLIC_KEY, lower, sequence)


PUBLIC, PRIVATE, BY_RELAY = TcpStrategy("8.8.8.8", 1), TcpStrategy("10.0.0.1", 1), RelayStrategy(RELAY)


@pytest.mark.parametrize(
    ("best", "worse"),
    [
        (over(PRIVATE, 1), over(PUBLIC, 9)),  # its connection is open
        (over(BY_RELAY, 6), over(PUBLIC)),
        (over(PUBLIC), over(BY_RELAY)),
        (over(PUBLIC), over(TcpStrategy("10.0.0.2", 1))),
        (over(BY_RELAY, 0), BY_RELAY),
    ],
)
def test_the_better_strategy_wins_wherever_it_stands(best: Any, worse: Any) -> None:
    def is_open(strategy: LowerStrategy) -> bool:
        return strategy == PRIVATE

    assert better(best, worse, is_open) is best
    assert better(worse, best, is_open) is best


def test_of_two_equals_the_newer_wins() -> None:
    older, newer = over(PUBLIC), over(TcpStrategy("9.9.9.9", 1))
    assert better(older, newer, lambda _: False) is newer
