"""The rule for errors of accept(2) that all accept loops share."""

from __future__ import annotations

import errno

from tunneld.errors import SHORTAGES
from tunneld.net.accept import CONNECTION_LOST, NOT_LISTENING, AcceptShortage


def test_a_spell_of_failures_is_reported_once() -> None:
    reported: list[OSError] = []
    shortage = AcceptShortage(reported.append)
    first, second = OSError(errno.EMFILE, "first spell"), OSError(errno.EMFILE, "second spell")
    active = []
    for _ in range(3):
        shortage.begin(first)
    active.append(shortage.active)
    shortage.end()
    active.append(shortage.active)
    shortage.begin(second)
    assert active == [True, False]
    assert reported == [first, second]


def test_no_error_is_in_two_groups() -> None:
    assert len(SHORTAGES | NOT_LISTENING | CONNECTION_LOST) == len(SHORTAGES) + len(NOT_LISTENING) + len(
        CONNECTION_LOST
    )
