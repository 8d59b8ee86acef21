"""Two ends joined by pipes that delay bytes: neither ever blames the other, and they agree on data and credit.

The pipes deliver any number of bytes in any order of the two directions, so every message can cross every other. The
callers do whatever callers may: open, answer, send, finish, reset and grant at any time, also from inside `receive`.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.wire.webmux.ends import CodecEnd, SessionModel
from tests.wire.webmux.helpers import check_ids, quick, seen
from tunneld.wire.webmux.events import Accepted, Broken, CreditAdded, Finished, Opened, Reset, SessionRefused
from tunneld.wire.webmux.header import FIRST_INITIATOR_ID, UNLIMITED
from tunneld.wire.webmux.sessions import NoFreeSessionError
from tunneld.wire.webmux.states import INCOMING, OVER, SENDING, TABLE, Party, Signal, State

FINISHED = {State.LOCAL_CLOSED}
RESETTABLE = {state for state, party, signal in TABLE if (party, signal) == (Party.US, Signal.RST)}
NUMBERS = st.integers(0, 1)
GRANTABLE = set(State) - OVER - {State.WITHDRAWN}


class TwoMachines(RuleBasedStateMachine):
    lowest: int | None = None  # of the initiator's ids, when there are to be few
    strict = True

    @initialize()
    def start(self) -> None:
        self.first = FIRST_INITIATOR_ID if self.lowest is None else self.lowest
        self.ends = (CodecEnd(0, self.first), CodecEnd(1, self.first))

    def pick(self, end: CodecEnd, data: st.DataObject, *states: State) -> int | None:
        found = end.in_state(*states)
        return data.draw(st.sampled_from(found)) if found else None

    @rule(number=NUMBERS)
    def open(self, number: int) -> None:
        end = self.ends[number]
        if self.strict and end.mux.can_open and not end.mux.table.ids.safely_available:
            return  # the last resort of `SessionIds`, which the last machine tests
        if end.mux.can_open:
            session = end.mux.open(80)
            end.models[session] = model = SessionModel()
            end.opened.setdefault(session, deque()).append(model)
        else:
            try:
                end.mux.open(80)
            except NoFreeSessionError:
                return
            raise AssertionError("opened although can_open is False")

    @rule(number=NUMBERS, data=st.data(), pushed=st.booleans(), finish=st.booleans())
    def send(self, number: int, data: st.DataObject, pushed: bool, finish: bool) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *SENDING)) is None:
            return
        payload = bytes(range(1, 256)) * 40
        payload = payload[: data.draw(st.sampled_from([0, 1, 5, 256, 9000]))]
        direction = end.models[session].directions[number]
        credit = end.mux.credit(session)
        taken = end.mux.send(session, payload, push=pushed, finish=finish)
        assert taken == min(len(payload), credit)
        direction.sent += payload[:taken]
        if taken == len(payload):
            direction.finished = finish
            if pushed:
                direction.record_ends_sent.append(len(direction.sent))

    @rule(number=NUMBERS, data=st.data(), finish=st.booleans())
    def answer(self, number: int, data: st.DataObject, finish: bool) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *INCOMING)) is not None:
            if finish:
                end.models[session].directions[number].finished = True
                end.mux.finish(session)
            else:
                end.mux.accept(session)

    @rule(number=NUMBERS, data=st.data())
    def finish(self, number: int, data: st.DataObject) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *SENDING)) is not None:
            end.models[session].directions[number].finished = True
            end.mux.finish(session)

    @rule(number=NUMBERS, data=st.data())
    def reset(self, number: int, data: st.DataObject) -> None:
        end = self.ends[number]
        states = RESETTABLE - (FINISHED if self.strict and self.lowest else set())
        if (session := self.pick(end, data, *states)) is not None:
            self.reset_session(end, session)

    def reset_session(self, end: CodecEnd, session: int) -> None:
        model = end.models[session]
        model.reset = True
        if end.mux.state(session) is State.SYN_SENT:
            model.directions[end.number].finished = True  # FIN is sent first
        end.mux.reset(session, text="test")

    @rule(number=NUMBERS, data=st.data(), size=st.sampled_from([1, 1000, 300_000, UNLIMITED]))
    def grant(self, number: int, data: st.DataObject, size: int) -> None:
        end = self.ends[number]
        if (session := self.pick(end, data, *GRANTABLE)) is not None:
            end.mux.grant(session, size)

    @rule(number=NUMBERS, session=st.sampled_from([2, 3, 4, 250, 251]))
    def grant_before(self, number: int, session: int) -> None:
        mux = self.ends[number].mux
        if mux.state(session) is State.IDLE and not mux.table.get(session).generation:
            mux.grant(session, 77)

    @rule(number=NUMBERS, more=st.integers(0, 20_000))
    def raise_default(self, number: int, more: int) -> None:
        mux = self.ends[number].mux
        mux.set_default_credit(mux.table.default_allowance + more)

    @rule(number=NUMBERS, mss=st.sampled_from([0, 1000, 1460, 20_000]))
    def set_mss(self, number: int, mss: int) -> None:
        self.ends[number].mux.set_mss(mss)

    @precondition(lambda self: any(end.pipe or end.mux.outgoing for end in self.ends))
    @rule(number=NUMBERS, share=st.sampled_from([0.1, 0.5, 1.0, 1.0]), cut=st.sampled_from([False] * 9 + [True]))
    def deliver(self, number: int, share: float, cut: bool) -> None:
        end = self.ends[number]
        end.flush()
        self.carry(number, int(len(end.pipe) * share), cut)

    def carry(self, number: int, size: int, cut: bool = False) -> None:
        """Move bytes from one end to the other, which may reset the session of the first item."""
        sender, receiver = self.ends[number], self.ends[1 - number]
        arrived = bytes(sender.pipe[:size])
        del sender.pipe[:size]
        for item in receiver.mux.receive(arrived):
            entry = seen(item)
            self.note(receiver, entry)
            session = entry[0] if isinstance(entry, tuple) else getattr(entry, "session", None)
            if cut and session is not None and receiver.mux.state(session) in RESETTABLE - FINISHED:
                cut = False
                self.reset_session(receiver, session)

    def note(self, end: CodecEnd, entry: object) -> None:
        other = self.ends[1 - end.number]
        match entry:
            case Broken() | SessionRefused() | Reset() | Finished() if not self.strict:
                pass
            case Opened(session, 80):
                end.models[session] = other.opened[session].popleft()
            case (int(session), bytes(payload), bool(push)):
                direction = end.models[session].directions[other.number]
                direction.received += payload
                assert not direction.ended
                assert direction.sent.startswith(direction.received)
                if push:
                    direction.record_ends_received.append(len(direction.received))
            case Finished(session):
                direction = end.models[session].directions[other.number]
                assert direction.finished
                assert direction.received == direction.sent
                direction.ended = True
            case SessionRefused(session) | Reset(session):
                assert end.models[session].reset
            case Accepted(session) | CreditAdded(session):
                assert session in end.models
            case Broken():
                raise AssertionError(entry)

    @invariant()
    def every_id_is_in_one_place(self) -> None:
        for end in self.ends:
            check_ids(end.mux, range(self.first + end.number, 256, 2))

    def teardown(self) -> None:
        """Deliver everything; then both ends must agree on all sessions that are alive."""
        while any(end.pipe or end.mux.outgoing for end in self.ends):
            for end in self.ends:
                end.flush()
                self.carry(end.number, len(end.pipe))
        if not self.strict:
            return
        for end, other in (self.ends, self.ends[::-1]):
            for session, model in end.models.items():
                self.compare(end, other, session, model)

    def compare(self, end: CodecEnd, other: CodecEnd, session: int, model: SessionModel) -> None:
        assert (end.mux.state(session) in OVER) == (other.mux.state(session) in OVER)
        if other.models.get(session) is not model or model.reset:
            return
        direction = model.directions[end.number]
        assert direction.received == direction.sent
        assert direction.record_ends_received == direction.record_ends_sent
        assert direction.ended == direction.finished
        if end.mux.state(session) in SENDING and other.mux.state(session) is not State.SYN_RCVD:
            assert end.mux.credit(session) == other.mux.allowance(session)


class TwoMachinesWithThreeIds(TwoMachines):
    """Ids are reused soon. The callers do not reset after they finished: see `sessions` for what can be late then."""

    lowest = 250


class TwoMachinesAtTheLastResort(TwoMachines):
    """Two ids, reused even if the peer may still send for the previous generation. A session may then fail, but none
    receives data of another.
    """

    lowest = 252
    strict = False


profile = settings(quick, max_examples=60, stateful_step_count=40)
TwoMachines.TestCase.settings = profile
TwoMachinesWithThreeIds.TestCase.settings = settings(profile, max_examples=70)
TwoMachinesAtTheLastResort.TestCase.settings = settings(profile, max_examples=70)
test_two_machines_agree = TwoMachines.TestCase
test_two_machines_agree_with_three_ids = TwoMachinesWithThreeIds.TestCase
test_nothing_is_misdelivered_at_the_last_resort = TwoMachinesAtTheLastResort.TestCase
