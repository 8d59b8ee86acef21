"""Properties for all input: any cut has the same result, garbage is the peer's fault, and little is buffered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from hypothesis import example, given
from hypothesis import strategies as st

from tests.wire.webmux.helpers import Seen, frame, merged, quick, receive, seen, take_output
from tunneld.errors import RemoteProtocolError
from tunneld.wire.webmux.events import CreditAdded
from tunneld.wire.webmux.header import CONTROL, FIN, MAX_TEXT, PUSH, RST, SYN, WITHOUT_PAYLOAD, Code
from tunneld.wire.webmux.mux import Mux

session_ids = st.sampled_from([0, 1, 2, 3, 4, 5, 254, 255])
payloads = st.one_of(st.binary(max_size=20), st.sampled_from([20, 6000, 16384]).map(bytes))


@st.composite
def data_frames(draw: st.DrawFn) -> bytes:
    flags = sum(draw(st.sets(st.sampled_from([FIN, RST, PUSH]), max_size=2)))
    return frame(draw(session_ids), flags, draw(payloads), long=draw(st.booleans()))


@st.composite
def syn_frames(draw: st.DrawFn) -> bytes:
    return frame(
        draw(session_ids), SYN | draw(st.sampled_from([0, 0, FIN, PUSH, RST])), value=draw(st.integers(0, 2**18))
    )


@st.composite
def control_frames(draw: st.DrawFn) -> bytes:
    code, session, long = draw(st.integers(0, 15)), draw(session_ids), draw(st.booleans())
    if code in WITHOUT_PAYLOAD:
        return frame(session, CONTROL | code << 19, value=draw(st.integers(0, 2**20)), long=long)
    payload = draw(st.text(max_size=9)).encode() if code == Code.INTERN_ATOM else draw(payloads)
    return frame(session, CONTROL | code << 19, payload, long=long)


frames = st.lists(st.one_of(data_frames(), data_frames(), syn_frames(), control_frames()), max_size=12)
steps = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 64, 5000]), min_size=1, max_size=8)


def busy() -> Mux:
    """An initiator with sessions in many states."""
    mux = Mux(initiator=True)
    for _ in range(3):
        mux.open(80)
    receive(mux, frame(2, SYN, value=80) + frame(3, SYN, value=7) + frame(5, SYN, value=7))
    mux.accept(3)
    mux.finish(6)
    take_output(mux)
    return mux


def outcome(mux: Mux, feed: Callable[[Mux], list[Seen]]) -> tuple[list[Seen], str, bytes, list[object]]:
    """What comes of some input. `CreditAdded` is left out: the default credit is added once per `receive`, in no
    particular order with other items. The credit itself is compared.
    """
    items: list[Seen] = []
    error = ""
    try:
        items = [item for item in feed(mux) if not isinstance(item, CreditAdded)]
    except RemoteProtocolError as problem:
        error = str(problem)
        list(mux._apply_default_credit())  # the end of the input, which it did not reach
    sessions = [(mux.state(sid), mux.credit(sid), mux.allowance(sid)) for sid in range(256)]
    return merged(items), error, take_output(mux), [*sessions, mux.live, mux.can_open]


def feed_in_steps(data: bytes, sizes: list[int]) -> Callable[[Mux], list[Seen]]:
    def feed(mux: Mux) -> list[Seen]:
        items, at, turn = [], 0, 0
        while at < len(data):
            step = sizes[turn % len(sizes)]
            items += receive(mux, data[at : at + step])
            at, turn = at + step, turn + 1
        return items

    return feed


@quick
@given(frames, steps)
@example([frame(2, FIN | PUSH, b"hello"), frame(2, 0, b"late", long=True)], [1])
def test_any_cut_has_the_same_items_answers_and_states(wire: list[bytes], sizes: list[int]) -> None:
    data = b"".join(wire)
    whole = outcome(busy(), lambda mux: receive(mux, data))
    cut = outcome(busy(), feed_in_steps(data, sizes))
    if whole[1]:  # `outcome` drops the items before the error
        whole, cut = ([], *whole[1:]), ([], *cut[1:])
    assert cut == whole


@quick
@given(frames, steps, st.integers(1, 3))
def test_any_number_of_fragments_at_once_has_the_same_result_too(
    wire: list[bytes], sizes: list[int], max_fragments: int
) -> None:
    def feed_a_few_at_once(mux: Mux) -> list[Seen]:
        items, at, turn = [], 0, 0
        while at < len(data):
            step = sizes[turn % len(sizes)]
            scratch = bytearray(data[at : at + step])
            items += [seen(item) for item in mux.receive(memoryview(scratch), max_fragments)]
            scratch[:] = bytes(len(scratch))  # like the next read into the same buffer
            while mux.has_unparsed:
                items += [seen(item) for item in mux.receive(b"", max_fragments)]
            at, turn = at + step, turn + 1
        return items

    data = b"".join(wire)
    whole = outcome(busy(), lambda mux: receive(mux, data))
    slowly = outcome(busy(), feed_a_few_at_once)
    if whole[1]:
        whole, slowly = ([], *whole[1:]), ([], *slowly[1:])
    assert slowly == whole


@quick
@given(st.lists(st.one_of(st.binary(max_size=60), data_frames(), syn_frames(), control_frames()), max_size=12), steps)
def test_garbage_is_the_peers_fault_and_little_of_it_is_buffered(wire: list[bytes], sizes: list[int]) -> None:
    mux, data = busy(), b"".join(wire)
    with contextlib.suppress(RemoteProtocolError):
        feed_in_steps(data, sizes)(mux)
    fragment = mux._incoming
    assert len(mux._header) < 8
    assert fragment is None or len(fragment.kept) <= MAX_TEXT
    assert len(mux.outgoing) <= len(data)
    assert all(len(text) <= MAX_TEXT for text in mux._peer_atoms.values())


@quick
@given(st.lists(st.tuples(st.integers(0, 2), payloads, st.booleans()), max_size=10), st.integers(0, 5000), steps)
def test_what_is_sent_is_received(records: list[tuple[int, bytes, bool]], mss: int, sizes: list[int]) -> None:
    sender, receiver = Mux(initiator=True), Mux(initiator=False)
    receiver.set_mss(mss)
    receive(sender, take_output(receiver))
    opened = [sender.open(port) for port in range(3)]
    sent = dict.fromkeys(opened, (b"", 0))
    for number, payload, push in records:
        session = opened[number]
        taken = sender.send(session, payload, push=push)
        data, ends = sent[session]
        sent[session] = data + payload[:taken], ends + (push and taken == len(payload))
    received = feed_in_steps(take_output(sender), sizes)(receiver)
    for session, (data, ends) in sent.items():
        items = [item for item in received if isinstance(item, tuple) and item[0] == session]
        assert b"".join(item[1] for item in items) == data
        assert sum(item[2] for item in items) == ends
        assert receiver.allowance(session) == sender.credit(session)


def test_a_flood_of_single_bytes_costs_no_more_than_its_bytes() -> None:
    """The codec keeps nothing of a payload, so no cut makes it copy anything twice."""
    mux = busy()
    data = frame(2, PUSH, bytes(16384))
    items = [item for byte in data for item in receive(mux, bytes([byte]))]
    assert len(items) == 16384
    assert len(mux._header) == 0
