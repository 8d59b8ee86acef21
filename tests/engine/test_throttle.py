"""The throttle: never more than the rate and the quota, shared evenly, and no needless waiting."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.engine.bench import NOISE, Bench, read_all, read_exactly
from tunneld.engine.engine import Cause
from tunneld.engine.throttle import BURST_SECONDS, MAX_QUANTUM, MIN_QUANTUM, SharedBucket, TokenBucket

STEPS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, MAX_QUANTUM)), max_size=200)


@given(st.floats(1, 1e8), STEPS)
def test_no_interval_exceeds_the_rate_and_one_burst(rate: float, steps: list[tuple[float, int]]) -> None:
    bucket, now, used, taken = TokenBucket(rate, None, 0.0), 0.0, 0, [(0.0, 0)]
    for pause, unused in steps:
        now += pause
        count = bucket.take(now)
        back = min(count, unused)
        bucket.give_back(back)
        used += count - back
        taken.append((now, used))
    for index, (began, before) in enumerate(taken):
        for ended, after in taken[index:]:
            assert after - before <= rate * (ended - began) + bucket.size + bucket.quantum + 1e-3


@given(st.integers(1, 10**6), STEPS)
def test_a_quota_is_given_out_once_and_to_the_last_byte(quota: int, steps: list[tuple[float, int]]) -> None:
    bucket, used = TokenBucket(None, quota, 0.0), 0
    for _, unused in steps:
        count = bucket.take(0.0)
        back = min(count, unused)
        bucket.give_back(back)
        used += count - back
        assert used + (bucket.left or 0) == quota
    while count := bucket.take(0.0):
        used += count
    assert used == quota
    assert bucket.used_up


@given(st.floats(1000, 1e6), st.lists(st.tuples(st.floats(0, 0.1), st.booleans()), max_size=200))
def test_two_buckets_together_never_exceed_the_rate_that_they_share(
    rate: float, steps: list[tuple[float, bool]]
) -> None:
    shared = TokenBucket(rate, None, 0.0)
    pair = [SharedBucket(TokenBucket(None, None, 0.0), shared), SharedBucket(TokenBucket(2 * rate, None, 0.0), shared)]
    now = used = 0.0
    for pause, which in steps:
        now += pause
        used += pair[which].take(now)
    assert used <= rate * now + shared.size + 1e-3


def test_tokens_that_the_shared_bucket_refuses_stay_in_the_own_one() -> None:
    own, shared = TokenBucket(None, 1000, 0.0), TokenBucket(1000, None, 0.0)
    while shared.take(0.0):
        pass
    both = SharedBucket(own, shared)
    assert both.take(0.0) == 0
    assert (both.left, both.wait) == (1000, shared.wait)
    both.give_back(MIN_QUANTUM)
    assert shared.take(0.0) == MIN_QUANTUM


@pytest.mark.parametrize(
    ("rate", "quantum"),
    [(1, MIN_QUANTUM), (10_240, 512), (10_260, 513), (327_680, MAX_QUANTUM), (1e9, MAX_QUANTUM)],
)
def test_a_quantum_is_a_twentieth_of_a_second_within_bounds(rate: float, quantum: int) -> None:
    bucket = TokenBucket(rate, None, 0.0)
    assert bucket.quantum == quantum
    assert bucket.size == max(BURST_SECONDS * rate, quantum)


def test_a_changed_rate_and_quota_hold_from_then_on() -> None:
    bucket = TokenBucket(None, None, 0.0)
    assert bucket.take(0.0) == MAX_QUANTUM
    bucket.change(100_000, 4000)
    assert bucket.take(0.05) == 4000
    assert bucket.used_up
    bucket.change(100_000, 10**6)
    taken = 0
    for hundredth in range(5, 1005):
        while count := bucket.take(hundredth / 100):
            taken += count
    assert 0.95 * 10**6 <= taken <= 10**6 + bucket.size
    bucket.change(None, None)
    assert bucket.take(10.04) == MAX_QUANTUM


def test_after_its_wait_there_is_a_quantum() -> None:
    bucket = TokenBucket(1000, None, 0.0)
    while bucket.take(0.0):
        pass
    wait = bucket.wait
    assert wait > 0
    assert bucket.take(wait * 0.99) == 0
    assert bucket.take(wait * 1.01) == bucket.quantum


# In the engines


async def test_a_transfer_takes_as_long_as_the_rate_demands_and_loses_nothing(
    autojump_clock: MockClock, bench: Bench
) -> None:
    throttle = bench.engine.limit(100_000, None, lambda: None)
    joined = bench.join(linger=10, throttle=throttle)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await joined.server.send_all(NOISE[:500_000])
            await joined.server.send_eof()

        nursery.start_soon(send)
        assert await read_all(joined.visitor) == NOISE[:500_000]
    assert 4.5 <= trio.current_time() - began <= 6
    await joined.visitor.send_eof()
    assert (await joined.ends.one()).cause is Cause.FINISHED


async def test_visitors_share_the_rate_and_a_small_request_does_not_wait_for_large_ones(
    autojump_clock: MockClock, bench: Bench
) -> None:
    throttle = bench.engine.limit(100_000, None, lambda: None)
    bulk = [bench.join(linger=10, throttle=throttle) for _ in range(4)]
    small = bench.join(linger=10, throttle=throttle)
    counts = [0] * len(bulk)

    async def count(number: int) -> None:
        while True:
            counts[number] += len(await bulk[number].visitor.receive_some(65536))

    async with trio.open_nursery() as nursery:
        for number, joined in enumerate(bulk):
            nursery.start_soon(joined.server.send_all, NOISE)
            nursery.start_soon(count, number)
        await trio.sleep(2)
        sent_at = trio.current_time()
        await small.visitor.send_all(b"small")
        assert await read_exactly(small.server, 5) == b"small"
        assert trio.current_time() - sent_at <= 1
        await trio.sleep(6)
        nursery.cancel_scope.cancel()
    assert min(counts) >= 0.7 * max(counts)
    assert sum(counts) <= 100_000 * (trio.current_time() + 1)


async def test_a_used_up_quota_is_reported_and_nothing_more_passes(autojump_clock: MockClock, bench: Bench) -> None:
    used_up = trio.Event()
    throttle = bench.engine.limit(None, 100_000, used_up.set)
    joined = bench.join(linger=10, throttle=throttle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(joined.server.send_all, NOISE[:100_001])
        assert await read_exactly(joined.visitor, 100_000) == NOISE[:100_000]
        await used_up.wait()
        assert throttle.left == 0
        with trio.move_on_after(5) as waited:
            await joined.visitor.receive_some(1)
        assert waited.cancelled_caught
        nursery.cancel_scope.cancel()
    joined.relay.drop()


async def test_a_relay_that_is_dropped_while_queued_leaves_the_queue(autojump_clock: MockClock, bench: Bench) -> None:
    throttle = bench.engine.limit(1000, None, lambda: None)
    dropped, other = (bench.join(linger=10, throttle=throttle) for _ in range(2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dropped.server.send_all, NOISE[:50_000])
        nursery.start_soon(other.server.send_all, NOISE[:2_000])
        await trio.sleep(1)
        dropped.relay.drop()
        assert await read_exactly(other.visitor, 2_000) == NOISE[:2_000]
        assert trio.current_time() <= 6
        nursery.cancel_scope.cancel()
    other.relay.drop()
