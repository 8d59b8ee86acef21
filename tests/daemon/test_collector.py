"""What a full collection of garbage looks at."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from tunneld.daemon import collector
from tunneld.daemon.collector import Collector

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 collects in small steps by itself")


class Node:
    """Refers to itself: only the collector can free it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _only_collected_on_demand() -> Iterator[None]:
    made = Collector()
    gc.collect()
    gc.disable()
    made.install()
    yield
    gc.callbacks.remove(made.on_collection)
    gc.unfreeze()
    gc.enable()


def frozen_garbage() -> weakref.ref[Node]:
    """A cycle that was in use at a full collection, and is not any more."""
    node = Node()
    gc.collect()
    return weakref.ref(node)


def test_young_garbage_is_freed_at_once() -> None:
    node = weakref.ref(Node())
    assert node() is not None
    gc.collect()
    assert node() is None


def test_what_survived_a_full_collection_is_left_out_of_the_next() -> None:
    node = frozen_garbage()
    gc.collect()
    assert node() is not None
    assert len(gc.get_objects(generation=2)) < gc.get_freeze_count() / 10


def test_everything_is_collected_once_enough_was_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "MIN_FROZEN", 1000)
    node = frozen_garbage()
    kept = [[number] for number in range(1000)]
    gc.collect()
    assert node() is not None, "the limit is not exceeded before this collection"
    gc.collect()
    assert node() is None
    assert len(kept) == 1000


def test_after_that_as_many_may_be_frozen_as_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "MIN_FROZEN", 1000)
    kept = [[number] for number in range(5000)]
    gc.collect()
    gc.collect()  # of everything: at least 5000 objects are in use
    node = frozen_garbage()
    kept += [[number] for number in range(1500)]
    gc.collect()
    gc.collect()
    assert node() is not None
