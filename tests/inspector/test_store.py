"""The newest exchanges stay, within the limits."""

from __future__ import annotations

from tests.inspector.support import Recorded
from tunneld.inspector.records import EXCHANGE_COST
from tunneld.inspector.settings import InspectorLimits
from tunneld.inspector.store import ExchangeStore

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + bytes(1000)


def test_the_oldest_goes_first_and_memory_is_bounded() -> None:
    store = ExchangeStore(InspectorLimits(memory=20_000, body=1000))
    made = Recorded(store)
    for number in range(50):
        made.ask(b"GET /%d HTTP/1.1\r\n\r\n" % number)
        made.reply(OK)
        assert store.kept <= 20_000
    targets = [one.request and one.request.target for one in store]
    assert targets[-1] == "/49"
    assert targets == [f"/{number}" for number in range(50 - len(targets), 50)]
    assert store.dropped == 50 - len(targets) > 0
    assert store.kept == sum(one.cost for one in store)


def test_nothing_is_kept_of_a_dropped_exchange_that_goes_on() -> None:
    store = ExchangeStore(InspectorLimits(exchanges=1))
    first, second = Recorded(store), Recorded(store)
    first.ask(b"POST /1 HTTP/1.1\r\nContent-Length: 4\r\n\r\nab")
    old = first.one
    second.ask(b"GET /2 HTTP/1.1\r\n\r\n")
    first.ask(b"cd")
    assert old.request is not None
    assert (bytes(old.request.body), old.request.size) == (b"", 4)
    assert store.kept == second.one.cost >= EXCHANGE_COST


def test_at_most_so_many_bytes_of_a_body() -> None:
    made = Recorded(ExchangeStore(InspectorLimits(body=999)))
    made.ask(b"GET / HTTP/1.1\r\n\r\n")
    made.reply(OK)
    response = made.one.response
    assert response is not None
    assert (len(response.body), response.size, response.is_whole) == (999, 1000, False)


async def test_a_page_hears_of_changes_until_it_leaves() -> None:
    store = ExchangeStore(InspectorLimits())
    made = Recorded(store)
    with store.watching() as watch:
        made.ask(b"GET / HTTP/1.1\r\n\r\n")
        assert await watch.wait() == {1}
        store.clear()
        assert await watch.wait() == set()
    made.ask(b"GET / HTTP/1.1\r\n\r\n")
    assert not watch.changed
