"""A node that has a session and sends what it likes: it ends its own association at most. Work is counted."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.egtp.bench import AGENT, RELAY, NodePair, node_pair, sessions
from tests.engine.bench import tcp_pair
from tunneld.egtp.handshake import NodeConnection
from tunneld.egtp.limits import MAX_REQUEST_VALUES, MAX_REQUESTS, MESSAGE_COST, OTHER_COST
from tunneld.egtp.link import Link
from tunneld.egtp.session import NodeSession
from tunneld.errors import NoSuchTunnelError, NotAllowedError, RemoteProtocolError
from tunneld.wire.egtp.envelope import HELLO, RECORDS, STREAMS, encode_streams
from tunneld.wire.egtp.fast import encode_for_you
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.streams import HEADER, Streams
from tunneld.wire.mencode import MencodeLimits, Value, decode

FRAMES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 300), st.binary(max_size=300)), max_size=20
).map(lambda items: b"".join(HEADER.pack(kind, sid, value) + payload[:value] for kind, sid, value, payload in items))


@pytest.fixture
async def pair() -> AsyncIterator[NodePair]:
    async with node_pair() as pair:
        yield pair


async def hostile(pair: NodePair) -> NodeConnection:
    """The agent's end of a link, without a carrier."""
    near, far = tcp_pair()
    agent, relay = await sessions(near, far)
    link = Link(pair.pump, relay.connection, relay.session, relay.frames, pair.relay.limits)
    pair.relay.attachment.attach(link, 0)
    return agent


def request(pairs: int) -> bytes:
    """A request with this many pairs, which take long to parse."""
    body: dict[int | bytes, Value] = {b"%03d" % number: 0 for number in range(pairs)}
    return MojoRequest(b"fill", RELAY.id.digest, os.urandom(20), body).encode()


def most_pairs() -> int:
    """How many pairs are permitted in a request."""
    pairs = 0
    with suppress(RemoteProtocolError):
        while decode(request(pairs), MencodeLimits(values=MAX_REQUEST_VALUES)):
            pairs += 1
    return pairs - 1


async def test_a_request_has_few_values(pair: NodePair) -> None:
    node = await hostile(pair)
    await node.send(request(most_pairs()))
    assert b"unrecognized message type" in await node.receive()
    await node.send(request(most_pairs() + 1))
    await pair.relay_owner.until(lambda: bool(pair.relay_owner.detached))
    assert "more than 64 values" in pair.relay_owner.detached[0]
    node.connection.close()


@pytest.mark.parametrize("kind", ["streams", "other"])
async def test_a_flood_of_messages_is_spread_over_turns(pair: NodePair, kind: str) -> None:
    """Empty messages cost no frames, but the budget of a turn counts them all the same."""
    node, count = await hostile(pair), 300
    before = pair.pump.budget.turn
    for number in range(count):
        if kind == "streams":
            await node.send(encode_for_you(RELAY.id.digest, os.urandom(20), encode_streams(number, b"")))
        else:
            await node.send(MojoRequest(b"fill", RELAY.id.digest, os.urandom(20), None).encode())
    if kind == "streams":
        while pair.relay.attachment.inbox.next < count:
            await trio.lowlevel.checkpoint()
    else:
        for _ in range(count):
            assert b"unrecognized message type" in await node.receive()
    cost = MESSAGE_COST if kind == "streams" else MESSAGE_COST + OTHER_COST
    assert pair.pump.budget.turn - before >= count * cost // (2 * pair.pump.budget.share)
    node.connection.close()


async def test_a_node_that_acknowledges_nothing_loses_its_link(pair: NodePair) -> None:
    node = await hostile(pair)
    link = pair.relay.attachment.output.link
    assert link is not None
    for _ in range(MAX_REQUESTS - len(link._requests)):
        link.send_streams(0, b"")
    assert len(link._requests) == MAX_REQUESTS
    assert pair.relay_owner.detached == []
    link.send_streams(0, b"")
    assert link.closed
    assert pair.relay_owner.detached == ["the peer does not acknowledge"]
    node.connection.close()


@given(FRAMES, st.binary(max_size=40), st.integers(1, 30))
def test_any_frames_are_parsed_or_the_peers_fault(frames: bytes, rest: bytes, most: int) -> None:
    """Each call yields no more than it was asked for, garbage causes no output, and nothing is left of it."""
    streams = Streams(initiator=False)
    streams.receive(frames + rest)
    with suppress(RemoteProtocolError):
        while streams.has_unparsed:
            assert sum(1 for _ in streams.parse(most)) <= most
    assert not streams.outgoing
    assert len(streams.streams) <= len(frames + rest) // HEADER.size


ENVELOPES = st.lists(
    st.tuples(st.sampled_from([HELLO, RECORDS, STREAMS, 0, 0x302]), st.binary(max_size=100)).map(
        lambda item: item[0].to_bytes(4, "big") + item[1]
    )
    | st.binary(max_size=100),
    max_size=5,
)


@given(ENVELOPES, st.booleans())
def test_any_envelopes_are_handled_or_the_peers_fault(envelopes: list[bytes], initiates: bool) -> None:
    session = (
        NodeSession.initiate(AGENT, RELAY.id)
        if initiates
        else NodeSession.accept(lambda recipient: RELAY if recipient == RELAY.id.digest else None)
    )
    with suppress(RemoteProtocolError, NotAllowedError, NoSuchTunnelError):
        for envelope in envelopes:
            assert session.receive(memoryview(envelope)) == []
    assert not session.established
    assert sum(map(len, session.take_outgoing())) < 2000
