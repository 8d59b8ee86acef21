"""The cost that the carriers of one owner cause in a turn of the pump is bounded, whatever their peers send."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
import trio

from tests.engine.bench import NOISE, Ends, stream, tcp_pair
from tests.mux.bench import CarrierPair
from tests.mux.test_hostile import RawPeer, head
from tunneld.engine.budget import CostShare
from tunneld.mux.limits import MAX_FRAMES_PER_TURN
from tunneld.wire.webmux.header import CONTROL, LONG, TWO_WORDS, Code
from tunneld.wire.webmux.mux import Mux

pytestmark = pytest.mark.parametrize("pair", ["plain"], indirect=True)

CARRIERS = 4
CHANNELS = 60
ROUNDS = 20

MSS = head(0, CONTROL | Code.SET_MSS << 19, 1)


def small_credits(round_: int) -> bytes:
    """AddCredit of a few bytes for every session."""
    return b"".join(head(sid, CONTROL | Code.ADD_CREDIT << 19, 5 + round_ % 2) for sid in range(3, 3 + 2 * CHANNELS, 2))


def defaults(round_: int) -> bytes:
    """SetDefaultCredit, which raises the credit of every unanswered session."""
    word = CONTROL | LONG | Code.SET_DEFAULT_CREDIT << 19
    return b"".join(TWO_WORDS.pack(word, 16_384 + 60 * round_ + more) for more in range(1, 61))


FLOODS: dict[str, Callable[[int], bytes]] = {
    "AddCredit": lambda round_: 4 * small_credits(round_),
    "SetDefaultCredit": lambda round_: 4 * defaults(round_),
    "SetMSS 1": lambda round_: MSS + 4 * small_credits(round_),
}


class Observer:
    """Looks at a share in every turn. Another owner, as far as the budget knows."""

    def __init__(self, pair: CarrierPair, observed: CostShare) -> None:
        self.seen: list[int] = []
        self._budget = pair.pump.budget
        self._observed, self._own = observed, CostShare(pair.pump.budget)
        self._budget.defer(self._own, self)

    def on_turn(self) -> None:
        self.seen.append(self._observed.left)
        self._own.use(1)
        self._budget.defer(self._own, self)

    def on_failure(self, error: Exception) -> None:
        raise error


@pytest.fixture
async def crowd(pair: CarrierPair) -> AsyncIterator[list[RawPeer]]:
    """Several carriers of one owner, with visitors that always have something to send."""
    peers = [RawPeer(pair) for _ in range(CARRIERS)]
    visitors = []
    for peer in peers:
        for _ in range(CHANNELS):
            visitor, near = tcp_pair()
            pair.pump.join(peer.carrier.open(80), near, linger=5, on_end=Ends().note)
            visitors.append(stream(visitor))
            await visitors[-1].send_all(NOISE[: 20 * 1024])
    yield peers
    for peer in peers:
        peer.carrier.close()
        await trio.aclose_forcefully(peer.stream)
    for stream_ in visitors:
        await trio.aclose_forcefully(stream_)


@pytest.mark.interpreted
@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_on_many_carriers_of_one_owner_costs_a_share_of_each_turn(
    pair: CarrierPair, crowd: list[RawPeer], flood: str
) -> None:
    share = CostShare(pair.pump.budget)
    observer = Observer(pair, share)
    async with trio.open_nursery() as nursery:
        for peer in crowd:
            nursery.start_soon(peer.discard_input)
            peer.carrier.turns.share = share
        for round_ in range(ROUNDS):
            for peer in crowd:
                await peer.stream.send_all(FLOODS[flood](round_))
        while len(observer.seen) < 100:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert min(observer.seen) >= -MAX_FRAMES_PER_TURN  # the last step of a turn may begin with one unit left
    assert sum(left <= 0 for left in observer.seen) > 3  # it took several turns


async def test_what_waits_for_its_turn_arrives(pair: CarrierPair) -> None:
    peer, (visitor, near) = RawPeer(pair), tcp_pair()
    far, codec = stream(visitor), Mux(initiator=True)
    pair.pump.join(peer.carrier.open(80), near, linger=5, on_end=Ends().note)
    await peer.send(MSS)
    text = NOISE[: 4 * pair.pump.limits.turn_cost]
    await far.send_all(text)
    received = bytearray()
    while len(received) < len(text):
        for item in codec.receive(await peer.stream.receive_some(65536)):
            if isinstance(item, tuple):
                assert len(item[1]) == 1
                received += item[1]
    assert received == text
    peer.carrier.close()
    await trio.aclose_forcefully(far)
    await trio.aclose_forcefully(peer.stream)
