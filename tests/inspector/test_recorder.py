"""Copies are bounded, and what is missing is noticed."""

from __future__ import annotations

import gzip

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tunneld.inspector.recorder import COPY_COST, PROGRESS, Recorder
from tunneld.inspector.settings import InspectorLimits
from tunneld.inspector.store import ExchangeStore

GET = b"GET / HTTP/1.1\r\n\r\n"


def recorder(**limits: int) -> Recorder:
    return Recorder(ExchangeStore(InspectorLimits(**limits)), lambda: 1.0)


def parse(recorder: Recorder) -> None:
    for _ in range(1000):
        recorder.parse_slice()


async def test_the_task_parses_a_moment_later(autojump_clock: MockClock) -> None:
    here = recorder()
    tap = here.tap("blog", "v")
    assert tap is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        tap.on_written(GET)
        assert len(here.store) == 0
        await trio.sleep(1)
        assert len(here.store) == 1
        nursery.cancel_scope.cancel()


def test_a_large_body_is_not_copied_once_enough_is_kept() -> None:
    here = recorder(body=1000, backlog=100_000)
    tap = here.tap("blog", "v")
    assert tap is not None
    tap.on_written(GET)
    tap.on_read(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n" + bytes(2000))
    parse(here)
    for _ in range(49):
        tap.on_read(bytes(1_000_000))
        assert here._size == 0  # nothing waits to be parsed but the places of the progress
    parse(here)
    response = next(iter(here.store)).response
    assert response is not None
    assert response.size // PROGRESS == 49_002_000 // PROGRESS
    tap.on_read(bytes(50_000_000 - 49_002_000) + b"HTTP/1.1 204 Next\r\n\r\n"[:0])
    parse(here)
    assert (response.size, response.lost, response.is_whole) == (50_000_000, 0, False)
    assert response.ended == 1.0
    tap.on_written(GET)
    tap.on_read(b"HTTP/1.1 204 No\r\n\r\n")
    parse(here)
    assert [one.response and one.response.status for one in here.store] == [200, 204]


def test_a_full_backlog_drops_copies_and_the_record_says_so() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n"
    here = recorder(backlog=len(GET) + len(head) + 1000 + 3 * COPY_COST)
    tap = here.tap("blog", "v")
    assert tap is not None
    tap.on_written(GET)
    tap.on_read(head)
    for _ in range(2):
        tap.on_read(bytes(1000))  # the second one does not fit
    parse(here)
    tap.on_read(bytes(1000))
    parse(here)
    exchange = next(iter(here.store))
    assert exchange.response is not None
    assert (exchange.response.size, exchange.response.lost) == (3000, 1000)
    assert exchange.note == "the inspector fell behind: a part of the body is missing"
    assert exchange.ended is not None


def test_a_lost_head_ends_the_looking_and_the_record_says_so() -> None:
    here = recorder(backlog=len(GET) + COPY_COST)
    tap = here.tap("blog", "v")
    assert tap is not None
    tap.on_written(GET)
    tap.on_read(b"HTTP/1.1 200 OK\r\n\r\n")  # lost
    parse(here)
    tap.end()
    parse(here)
    assert next(iter(here.store)).note == "the inspector fell behind"
    assert here.connections == 0


def test_small_copies_are_counted_with_what_they_cost() -> None:
    here = recorder(backlog=100_000)
    tap = here.tap("blog", "v")
    assert tap is not None
    for _ in range(1_000):
        tap.on_written(b"G")
    assert len(here._backlog) <= 100_000 // COPY_COST


def test_a_limited_number_of_connections_is_looked_at() -> None:
    here = recorder(connections=1)
    first = here.tap("blog", "v")
    assert here.tap("blog", "w") is None
    assert here.unseen == 1
    assert first is not None
    first.end()
    first.end()
    parse(here)
    assert here.tap("blog", "x") is not None


def test_no_copies_of_what_is_not_http() -> None:
    here = recorder()
    tap = here.tap("blog", "v")
    assert tap is not None
    tap.on_written(b"SSH-2.0-x\r\n")
    parse(here)
    tap.on_written(bytes(100_000))
    assert not here._backlog
    assert next(iter(here.store)).note.startswith("not HTTP")


def test_a_bug_ends_the_looking_and_nothing_else() -> None:
    here = recorder()
    tap = here.tap("blog", "v")
    assert tap is not None
    tap.conversation.feed = None  # type: ignore[method-assign,union-attr]
    tap.on_written(GET)
    parse(here)
    tap.on_written(GET)
    assert not here._backlog
    assert next(iter(here.store)).note == "internal error of the inspector"


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([GET, gzip.compress(bytes(9999)), b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 101 S\r\n\r\n", bytes(5000)])), max_size=12), st.integers(300, 9000))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_memory_stays_bounded_whatever_passes(pieces: list[tuple[bool, bytes]], backlog: int) -> None:
    here = recorder(backlog=backlog, memory=10_000, body=500)
    tap = here.tap("blog", "v")
    assert tap is not None
    for is_request, data in pieces:
        (tap.on_written if is_request else tap.on_read)(data)
        assert here._size <= backlog
        if len(data) % 2:
            parse(here)
        assert here.store.kept <= 10_000
    tap.end()
    parse(here)
    assert here.connections == 0
    assert all(one.ended is not None for one in here.store)
