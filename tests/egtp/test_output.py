"""What an association keeps until it is acknowledged, and the budget of all associations of one owner."""

from __future__ import annotations

import pytest

from tunneld.egtp.output import MessageOutput, OutputBudget
from tunneld.wire.egtp.envelope import STREAMS_HEADER

SIZE = 100
LIMIT = 3 * (SIZE + STREAMS_HEADER)


@pytest.fixture
def budget() -> OutputBudget:
    return OutputBudget(LIMIT)


def output(budget: OutputBudget) -> MessageOutput:
    return MessageOutput(lambda: 0.0, budget, lambda: None)


def collect(one: MessageOutput, most: int = 1 << 20) -> tuple[int, int]:
    """Offer a message; returns how many wait, and how many octets were not accepted."""
    outgoing = bytearray(SIZE)
    return len(one.collect(outgoing, most)), len(outgoing)


def test_all_associations_of_an_owner_have_one_budget(budget: OutputBudget) -> None:
    one, other = output(budget), output(budget)
    assert [collect(one) for _ in range(4)] == [(1, 0), (2, 0), (3, 0), (3, SIZE)]
    assert budget.used == LIMIT
    assert collect(other) == (1, 0)  # each may keep one message
    assert collect(other) == (1, SIZE)
    one.acknowledge_before(2)
    assert collect(other) == (2, 0)
    assert budget.used == LIMIT


def test_what_is_over_counts_no_more(budget: OutputBudget) -> None:
    one = output(budget)
    for _ in range(3):
        collect(one)
    one.discard()
    assert budget.used == 0
    assert collect(output(budget)) == (1, 0)


def test_a_poll_gets_what_fits_and_one_message_at_least(budget: OutputBudget) -> None:
    one = output(budget)
    assert [collect(one, most) for most in (1, 1, 2 * (SIZE + STREAMS_HEADER))] == [(1, 0), (1, 0), (2, 0)]


def test_output_without_a_link_is_reported_once_there_is_some() -> None:
    waiting: list[int] = []
    one = MessageOutput(lambda: 0.0, OutputBudget(), lambda: waiting.append(1))
    assert not one.write(bytearray())
    assert waiting == []
    assert not one.write(bytearray(1))
    assert waiting == [1]
