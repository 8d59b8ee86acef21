"""The rule for errors of accept(2) that all accept loops share."""

from __future__ import annotations

import errno

from tunneld.errors import SHORTAGES
from tunneld.net.accept import NOT_LISTENING, AcceptShortage


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


def test_no_error_is_both_a_shortage_and_a_bug_of_the_owner() -> None:
    assert not SHORTAGES & NOT_LISTENING
    assert errno.ECONNABORTED not in SHORTAGES | NOT_LISTENING
