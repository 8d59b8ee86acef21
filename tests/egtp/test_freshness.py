"""Freshness: a request is fresh once, and only with a proof that is not older than the newest one."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tunneld.egtp.freshness import MAX_PROOFS, MAX_SEEN, FreshnessGuard
from tunneld.wire.egtp.ids import id_of
from tunneld.wire.egtp.messages import MojoRequest

NODE, OTHER = b"A" * 20, b"B" * 20


def sent(number: int) -> bytes:
    return b"%020d" % number


def ask(guard: FreshnessGuard, nonce: int, proof: bytes | None, node: bytes = NODE) -> bool:
    request = MojoRequest(b"are there messages v2", b"R" * 20, b"%020d" % nonce, None, proof)
    return guard.is_fresh(node, request, id_of(request.encode()))


def test_without_a_proof_or_with_a_wrong_one_a_request_is_not_fresh() -> None:
    guard = FreshnessGuard()
    assert not ask(guard, 1, None)
    assert not ask(guard, 1, sent(1))
    guard.note_sent(NODE, sent(1))
    assert not ask(guard, 1, None)
    assert not ask(guard, 1, sent(2))
    assert not ask(guard, 1, sent(1), OTHER)
    assert ask(guard, 1, sent(1))


def test_a_request_is_fresh_once() -> None:
    guard = FreshnessGuard()
    guard.note_sent(NODE, sent(1))
    assert ask(guard, 1, sent(1))
    assert not ask(guard, 1, sent(1))
    assert ask(guard, 2, sent(1))


def test_an_older_proof_is_not_fresh() -> None:
    guard = FreshnessGuard()
    for number in (1, 2, 3):
        guard.note_sent(NODE, sent(number))
    assert ask(guard, 1, sent(2))
    assert not ask(guard, 2, sent(1))
    assert ask(guard, 3, sent(2))
    assert ask(guard, 4, sent(3))
    assert not ask(guard, 5, sent(2))


def test_what_is_remembered_is_limited() -> None:
    guard = FreshnessGuard(max_nodes=2)
    for number in range(MAX_PROOFS + 1):
        guard.note_sent(NODE, sent(number))
    assert not ask(guard, 0, sent(0))
    assert ask(guard, 0, sent(1))
    assert [ask(guard, number, sent(1)) for number in (MAX_SEEN - 1, MAX_SEEN)] == [True, True]
    for number in range(1, MAX_SEEN):
        ask(guard, number, sent(1))
    assert not ask(guard, MAX_SEEN + 1, sent(1))
    guard.note_sent(NODE, sent(99))
    assert ask(guard, MAX_SEEN + 1, sent(2))
    guard.note_sent(OTHER, sent(1))
    guard.note_sent(NODE, sent(100))
    guard.note_sent(b"C" * 20, sent(1))
    assert len(guard) == 2
    assert ask(guard, 1, sent(100))
    assert not ask(guard, 1, sent(1), OTHER)


class FreshnessMachine(RuleBasedStateMachine):
    """Whatever is sent and asked: no request is fresh twice."""

    def __init__(self) -> None:
        super().__init__()
        self.guard = FreshnessGuard()
        self.number = 0
        self.fresh: set[tuple[int, int]] = set()

    @rule(count=st.integers(1, 40))
    def send(self, count: int) -> None:
        for _ in range(count):
            self.number += 1
            self.guard.note_sent(NODE, sent(self.number))

    @rule(nonce=st.integers(0, 3), back=st.integers(0, 5))
    def ask(self, nonce: int, back: int) -> None:
        proof = self.number - back
        if ask(self.guard, nonce, sent(proof) if proof > 0 else None):
            assert (nonce, proof) not in self.fresh
            self.fresh.add((nonce, proof))


TestFreshnessMachine = FreshnessMachine.TestCase
TestFreshnessMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
