"""A carrier over another end. (All tests of carriers run over one, too: see the fixture `pair`.)"""

from __future__ import annotations

import ssl

import pytest

from tests.engine.bench import NOISE
from tests.mux.bench import CarrierPair
from tunneld.engine.end_stream import EndStream
from tunneld.mux.end_connection import EndConnection

pytestmark = pytest.mark.parametrize("pair", ["private"], indirect=True)


def connection_of(pair: CarrierPair) -> EndConnection:
    connection = pair.relay._connection
    assert isinstance(connection, EndConnection)
    return connection


async def test_what_arrives_when_it_is_not_its_turn_waits_and_comes_first(pair: CarrierPair) -> None:
    near, far = await pair.channels()
    connection, share = connection_of(pair), pair.relay.turns.share
    share.left = 0
    assert connection.on_data(memoryview(b"later")) == 0
    await EndStream(far).send_all(NOISE[:30_000])
    received = b""
    while len(received) < 30_000:
        received += await EndStream(near).receive_some()
    assert received == NOISE[:30_000]


async def test_an_end_of_file_behind_bytes_that_wait_does_not_overtake_them(pair: CarrierPair) -> None:
    connection = connection_of(pair)
    end = connection._end
    end.buffered += b"waits"
    end.eof_received = True
    buffer = memoryview(bytearray(100))
    assert connection.receive_into(buffer) == 5
    assert not connection.drained
    assert not pair.relay.over
    assert connection.receive_into(buffer) == 0


async def test_the_round_trip_is_that_which_its_owner_measured(pair: CarrierPair) -> None:
    connection = connection_of(pair)
    assert connection.round_trip() == float("inf")
    connection.measured_round_trip = 0.25
    assert connection.round_trip() == 0.25


async def test_it_knows_why_it_was_lost(pair: CarrierPair) -> None:
    near, _ = await pair.channels()
    connection = connection_of(pair)
    connection.on_reset(ssl.SSLError(1, "bad record mac"))
    assert isinstance(connection.failure, ssl.SSLError)
    assert (pair.relay.over, near.closed) == (True, True)
    await pair.agent_owner.closed.wait()


async def test_it_is_lost_with_the_end_below(pair: CarrierPair) -> None:
    connection = connection_of(pair)
    connection._end.close()
    await pair.agent_owner.closed.wait()
    assert pair.agent_owner.reason == "the peer closed the connection"
    with pytest.raises(OSError, match="the peer closed"):
        connection.write(bytearray(b"x"))
    with pytest.raises(OSError, match="the peer closed"):
        connection.attach(pair.pump, pair.relay)
    pair.relay.close()
