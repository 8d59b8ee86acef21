"""A deadline that is moved often."""

from __future__ import annotations

import math

import pytest

from tunneld.engine.scheduler import Scheduler
from tunneld.sites.deadline import Deadline

pytestmark = pytest.mark.interpreted  # a compiled class accepts no other scheduler than its own


class Clock:
    """Timers that the test reads."""

    def __init__(self) -> None:
        self.time = 0.0
        self.watched: list[Deadline] = []
        self.told = 0

    @property
    def timers(self) -> Clock:
        return self

    def now(self) -> float:
        return self.time

    def watch(self, deadline: Deadline) -> None:
        self.told += 1
        if deadline not in self.watched:
            self.watched.append(deadline)

    def forget(self, deadline: Deadline) -> None:
        if deadline in self.watched:
            self.watched.remove(deadline)

    def pass_to(self, time: float) -> None:
        """Let time pass, as `Timers` does."""
        while (earliest := min((each.deadline for each in self.watched), default=math.inf)) <= time:
            self.time = max(self.time, earliest)
            for each in [each for each in self.watched if each.deadline <= self.time]:
                self.watched.remove(each)
                each.on_deadline()
        self.time = time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def calls(clock: Clock) -> list[float]:
    return []


@pytest.fixture
def deadline(clock: Clock, calls: list[float]) -> Deadline:
    engine: Scheduler = clock  # type: ignore[assignment]
    return Deadline(engine, lambda: calls.append(clock.time))


def test_it_calls_once(clock: Clock, calls: list[float], deadline: Deadline) -> None:
    deadline.set(5)
    clock.pass_to(4)
    assert calls == []
    clock.pass_to(100)
    assert calls == [5]


def test_moving_it_back_tells_the_timers_nothing(clock: Clock, calls: list[float], deadline: Deadline) -> None:
    for _ in range(50):
        deadline.set(0)
        deadline.set(75)
        clock.pass_to(clock.time + 1)
    assert clock.told == 1
    clock.pass_to(1000)
    assert calls == [49 + 75]
    assert clock.told == 2


def test_moving_it_forward_does(clock: Clock, calls: list[float], deadline: Deadline) -> None:
    deadline.set(75)
    deadline.set(10)
    clock.pass_to(1000)
    assert calls == [10]


def test_none_at_all(clock: Clock, calls: list[float], deadline: Deadline) -> None:
    deadline.set(10)
    deadline.set(0)
    clock.pass_to(1000)
    deadline.set(10)
    deadline.stop()
    clock.pass_to(2000)
    assert calls == []
    assert clock.watched == []
    deadline.set(10)
    clock.pass_to(3000)
    assert calls == [2010]
