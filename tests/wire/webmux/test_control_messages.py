"""Control messages with a payload: texts are kept within a limit, the rest is skipped."""

from __future__ import annotations

import pytest

from tests.wire.webmux.helpers import frame, reach, receive
from tunneld.errors import RemoteProtocolError
from tunneld.wire.webmux.events import AtomInterned, EndpointDefined
from tunneld.wire.webmux.header import CONTROL, MAX_TEXT, Code
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.states import State


def control(code: int, session: int, payload: bytes = b"", value: int | None = None, *, long: bool = False) -> bytes:
    return frame(session, CONTROL | code << 19, payload, value, long=long)


@pytest.mark.parametrize("code", [Code.NO_OP, *range(6, 16)])
def test_noop_and_undefined_control_messages_are_skipped_with_their_payload(code: int) -> None:
    mux, session = reach(State.OPEN)
    data = control(code, 77, b"\xff" * 70_001) + control(code, 2, b"abc", long=True) + frame(session, 0, b"x")
    assert receive(mux, data) == [(session, b"x", False)]


def test_atoms_may_be_redefined_and_name_endpoints() -> None:
    mux = Mux(initiator=False)
    data = control(Code.INTERN_ATOM, 7, b"urn:a") + control(Code.DEFINE_ENDPOINT, 9, value=0x20007)
    assert receive(mux, data) == [AtomInterned(0x20007, "urn:a"), EndpointDefined(0x20007, "urn:a")]
    assert receive(mux, control(Code.INTERN_ATOM, 7, "urn:\u00e9".encode())) == [AtomInterned(0x20007, "urn:\u00e9")]
    assert mux.peer_atom(0x20007) == "urn:\u00e9"
    assert receive(mux, control(Code.DEFINE_ENDPOINT, 0, value=80)) == [EndpointDefined(80, None)]


def test_an_atom_beyond_the_limit_ends_the_connection_at_its_header() -> None:
    mux = Mux(initiator=False)
    assert receive(mux, control(Code.INTERN_ATOM, 7, b"x" * MAX_TEXT)) == [AtomInterned(0x20007, "x" * MAX_TEXT)]
    with pytest.raises(RemoteProtocolError, match="atom 7 of 1025 bytes is longer than 1024"):
        receive(mux, control(Code.INTERN_ATOM, 7, b"x" * (MAX_TEXT + 1))[:4])


def test_an_atom_that_is_not_utf8_ends_the_connection() -> None:
    with pytest.raises(RemoteProtocolError, match="atom 0 is not UTF-8: byte 1"):
        receive(Mux(initiator=False), control(Code.INTERN_ATOM, 0, b"a\xff"))
