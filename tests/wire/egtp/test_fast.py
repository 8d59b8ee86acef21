"""The two mojo messages of streams are what the general encoder makes, and nothing else is taken for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.wire.egtp.fast import decode_for_you, decode_received, encode_for_you, encode_received
from tunneld.wire.egtp.messages import MojoRequest, MojoResponse
from tunneld.wire.egtp.relaying import MESSAGE_FOR_YOU, success

R, N = b"R" * 20, b"N" * 20


@given(envelope=st.binary(max_size=300), recipient=st.binary(min_size=20, max_size=20))
def test_requests_are_those_of_the_general_encoder(envelope: bytes, recipient: bytes) -> None:
    message = encode_for_you(recipient, N, envelope)
    assert message == MojoRequest(MESSAGE_FOR_YOU, recipient, N, {b"message": envelope}).encode()
    found = decode_for_you(memoryview(message), recipient)
    assert found is not None
    assert (found[0], bytes(found[1])) == (N, envelope)


def test_responses_are_those_of_the_general_encoder() -> None:
    message = encode_received(N)
    assert message == MojoResponse(MESSAGE_FOR_YOU + b" response", N, success(), freshness=N).encode()
    assert decode_received(memoryview(message)) == N


@pytest.mark.parametrize("envelope", [b"", b"x", b"x" * 10, b"x" * 99_999])
def test_every_octet_that_is_not_free_is_checked(envelope: bytes) -> None:
    message = bytearray(encode_for_you(R, N, envelope))
    free = {*range(message.index(N), message.index(N) + 20)}
    free |= {*range(message.index(envelope + b"))))"), len(message) - 4)} if envelope else set()
    for at in (at for at in range(len(message)) if at not in free):
        message[at] ^= 1
        assert decode_for_you(memoryview(message), R) is None
        message[at] ^= 1
    assert decode_for_you(memoryview(message), R) is not None
    assert decode_for_you(memoryview(message)[:-1], R) is None
    assert decode_for_you(memoryview(message + b")"), R) is None
    assert decode_for_you(memoryview(message), N) is None


def test_every_octet_of_a_response_is_checked() -> None:
    message = bytearray(encode_received(N))
    for at in (at for at in range(len(message)) if message[at] != ord("N")):
        message[at] ^= 1
        assert decode_received(memoryview(message)) is None
        message[at] ^= 1
    assert decode_received(memoryview(message)[:-1]) is None


@given(st.binary(max_size=400))
def test_other_octets_are_neither(octets: bytes) -> None:
    assert decode_for_you(memoryview(octets), R) is None
    assert decode_received(memoryview(octets)) is None
