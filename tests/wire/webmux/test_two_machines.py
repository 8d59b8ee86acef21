"""Two ends joined by pipes that hold octets back: neither ever blames the other, and they agree on octets and credit.

The pipes deliver any number of octets in any order of the two directions, so every message crosses every other. The
callers do what callers may: open, answer, send, finish, reset and grant at any time, also from inside `receive`.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.wire.webmux.ends import End, Life
from tests.wire.webmux.helpers import check_books, quick, seen
from tunneld.wire.webmux.events import Accepted, Broken, CreditAdded, Finished, Opened, Reset, SessionRefused
from tunneld.wire.webmux.header import FIRST_INITIATOR_ID, UNLIMITED
from tunneld.wire.webmux.sessions import NoFreeSessionError
from tunneld.wire.webmux.states import CALLED, OVER, SENDING, TABLE, Said, State, Who

FINISHED = {State.LOCAL_CLOSED}
RESETTABLE = {state for state, who, said in TABLE if (who, said) == (Who.US, Said.RST)}
NUMBERS = st.integers(0, 1)
GRANTABLE = set(State) - OVER - {State.WITHDRAWN}


class TwoMachines(RuleBasedStateMachine):
    lowest: int | None = None  # of the initiator's ids, when there are to be few
    strict = True

    @initialize()
    def start(self) -> None:
        self.first = FIRST_INITIATOR_ID if self.lowest is None else self.lowest
        self.ends = (End(0, self.first), End(1, self.first))

    def pick(self, end: End, data: st.DataObject, *states: State) -> int | None:
        found = end.where(*states)
        return data.draw(st.sampled_from(found)) if found else None

    @rule(number=NUMBERS)
    def open(self, number: int) -> None:
        end = self.ends[number]
        ids = end.mux._lives.ids
        if self.strict and end.mux.can_open and not (ids._settled or ids._finished):
            return  # the last resort of `ids`, on which the next machine lives
        if end.mux.can_open:
            session = end.mux.open(80)
            end.lives[session] = life = Life()
            end.calls.setdefault(session, deque()).append(life)
        else:
            try:
                end.mux.open(80)
            except NoFreeSessionError:
                return
            raise AssertionError("opened although it said that it cannot")

    @rule(number=NUMBERS, data=st.data(), pushed=st.booleans(), finish=st.booleans())
    def send(self, number: int, data: st.DataObject, pushed: bool, finish: bool) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *SENDING)) is None:
            return
        payload = bytes(range(1, 256)) * 40
        payload = payload[: data.draw(st.sampled_from([0, 1, 5, 256, 9000]))]
        way = end.lives[session].ways[number]
        credit = end.mux.credit(session)
        taken = end.mux.send(session, payload, push=pushed, finish=finish)
        assert taken == min(len(payload), credit)
        way.sent += payload[:taken]
        if taken == len(payload):
            way.finished = finish
            if pushed:
                way.marks_sent.append(len(way.sent))

    @rule(number=NUMBERS, data=st.data(), finish=st.booleans())
    def answer(self, number: int, data: st.DataObject, finish: bool) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *CALLED)) is not None:
            if finish:
                end.lives[session].ways[number].finished = True
                end.mux.finish(session)
            else:
                end.mux.accept(session)

    @rule(number=NUMBERS, data=st.data())
    def finish(self, number: int, data: st.DataObject) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *SENDING)) is not None:
            end.lives[session].ways[number].finished = True
            end.mux.finish(session)

    @rule(number=NUMBERS, data=st.data())
    def reset(self, number: int, data: st.DataObject) -> None:
        end = self.ends[number]
        states = RESETTABLE - (FINISHED if self.strict and self.lowest else set())
        if (session := self.pick(end, data, *states)) is not None:
            self.cut(end, session)

    def cut(self, end: End, session: int) -> None:
        life = end.lives[session]
        life.reset = True
        if end.mux.state(session) is State.SYN_SENT:
            life.ways[end.number].finished = True  # a FIN for now
        end.mux.reset(session, text="test")

    @rule(number=NUMBERS, data=st.data(), octets=st.sampled_from([1, 1000, 300_000, UNLIMITED]))
    def grant(self, number: int, data: st.DataObject, octets: int) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *GRANTABLE)) is not None:
            end.mux.grant(session, octets)

    @rule(number=NUMBERS, session=st.sampled_from([2, 3, 4, 250, 251]))
    def grant_before(self, number: int, session: int) -> None:
        mux = self.ends[number].mux
        if mux.state(session) is State.IDLE and not mux._sessions[session].life:
            mux.grant(session, 77)

    @rule(number=NUMBERS, more=st.integers(0, 20_000))
    def raise_default(self, number: int, more: int) -> None:
        mux = self.ends[number].mux
        mux.set_default_credit(mux._lives.default_allowance + more)

    @rule(number=NUMBERS, mss=st.sampled_from([0, 1000, 1460, 20_000]))
    def set_mss(self, number: int, mss: int) -> None:
        self.ends[number].mux.set_mss(mss)

    @precondition(lambda self: any(end.pipe or end.mux.outgoing for end in self.ends))
    @rule(number=NUMBERS, share=st.sampled_from([0.1, 0.5, 1.0, 1.0]), cut=st.sampled_from([False] * 9 + [True]))
    def deliver(self, number: int, share: float, cut: bool) -> None:
        end = self.ends[number]
        end.flush()
        self.carry(number, int(len(end.pipe) * share), cut)

    def carry(self, number: int, octets: int, cut: bool = False) -> None:
        """Move octets from one end to the other, which may reset the session of the first item."""
        sender, receiver = self.ends[number], self.ends[1 - number]
        arrived = bytes(sender.pipe[:octets])
        del sender.pipe[:octets]
        for item in receiver.mux.receive(arrived):
            entry = seen(item)
            self.note(receiver, entry)
            session = entry[0] if isinstance(entry, tuple) else getattr(entry, "session", None)
            if cut and session is not None and receiver.mux.state(session) in RESETTABLE - FINISHED:
                cut = False
                self.cut(receiver, session)

    def note(self, end: End, entry: object) -> None:
        other = self.ends[1 - end.number]
        match entry:
            case Broken() | SessionRefused() | Reset() | Finished() if not self.strict:
                pass
            case Opened(session, 80):
                end.lives[session] = other.calls[session].popleft()
            case (int(session), bytes(payload), bool(push)):
                way = end.lives[session].ways[other.number]
                way.heard += payload
                assert not way.ended
                assert way.sent.startswith(way.heard)
                if push:
                    way.marks_heard.append(len(way.heard))
            case Finished(session):
                way = end.lives[session].ways[other.number]
                assert way.finished
                assert way.heard == way.sent
                way.ended = True
            case SessionRefused(session) | Reset(session):
                assert end.lives[session].reset
            case Accepted(session) | CreditAdded(session):
                assert session in end.lives
            case Broken():
                raise AssertionError(entry)

    @invariant()
    def every_id_is_in_one_place(self) -> None:
        for end in self.ends:
            check_books(end.mux, range(self.first + end.number, 256, 2))

    def teardown(self) -> None:
        """Deliver everything; then both ends must agree on all that still lives."""
        while any(end.pipe or end.mux.outgoing for end in self.ends):
            for end in self.ends:
                end.flush()
                self.carry(end.number, len(end.pipe))
        if not self.strict:
            return
        for end, other in (self.ends, self.ends[::-1]):
            for session, life in end.lives.items():
                self.compare(end, other, session, life)

    def compare(self, end: End, other: End, session: int, life: Life) -> None:
        assert (end.mux.state(session) in OVER) == (other.mux.state(session) in OVER)
        if other.lives.get(session) is not life or life.reset:
            return
        way = life.ways[end.number]
        assert way.heard == way.sent
        assert way.marks_heard == way.marks_sent
        assert way.ended == way.finished
        if end.mux.state(session) in SENDING and other.mux.state(session) is not State.SYN_RCVD:
            assert end.mux.credit(session) == other.mux.allowance(session)


class TwoMachinesWithThreeIds(TwoMachines):
    """Ids are soon used again. The callers do not reset after they finished: see `ids` for what can then be late."""

    lowest = 250


class TwoMachinesAtTheLastResort(TwoMachines):
    """Two ids, opened again even when it is not known whether the peer has forgotten them. A session may then fail, but
    none hears what was said on another.
    """

    lowest = 252
    strict = False


profile = settings(quick, max_examples=60, stateful_step_count=40)
TwoMachines.TestCase.settings = profile
TwoMachinesWithThreeIds.TestCase.settings = settings(profile, max_examples=70)
TwoMachinesAtTheLastResort.TestCase.settings = settings(profile, max_examples=70)
test_two_machines_agree = TwoMachines.TestCase
test_two_machines_agree_with_three_ids = TwoMachinesWithThreeIds.TestCase
test_nothing_goes_astray_at_the_last_resort = TwoMachinesAtTheLastResort.TestCase
