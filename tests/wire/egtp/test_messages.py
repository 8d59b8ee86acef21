"""Mojo messages: round trips, what is required of a message, fuzzing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.ids import id_of
from tunneld.wire.egtp.messages import (
    MessageHint,
    MojoRequest,
    MojoResponse,
    failure_of,
    parse_message,
    response_to,
)
from tunneld.wire.mencode import decode, encode

ids = st.binary(min_size=20, max_size=20)
bodies: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.integers(), st.binary(max_size=20), st.just([b"x", 1]), st.just({b"a": None, 3: []})
)
optional_ids = st.none() | ids
kinds = st.binary(min_size=1, max_size=40)
headers: st.SearchStrategy[Any] = st.just({}) | st.just({b"result": b"failure", b"reason": b"no"})
metainfo = st.none() | st.just({b"sequence num": 3})
requests = st.builds(MojoRequest, kinds, ids, ids, bodies, optional_ids, headers, metainfo)
response_kinds = kinds.map(lambda kind: kind + b" response")
responses = st.builds(MojoResponse, response_kinds, ids, bodies, optional_ids, headers, metainfo, metainfo)

REQUEST = MojoRequest(b"are there messages v2", b"R" * 20, b"N" * 20, {b"response version": 3})
REQUEST_ID = id_of(REQUEST.encode())
RESPONSE = response_to(REQUEST, REQUEST_ID, {b"result": b"no"})


@given(requests | responses)
@settings(max_examples=60)
def test_what_was_encoded_is_parsed(message: MojoRequest | MojoResponse) -> None:
    assert parse_message(message.encode()) == message


@given(st.sampled_from([REQUEST, RESPONSE]), st.data())
def test_wrong_octets_are_the_peers_fault(message: MojoRequest | MojoResponse, data: st.DataObject) -> None:
    wrong = bytearray(message.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_message(bytes(wrong))
    except RemoteProtocolError as problem:
        assert len(str(problem)) < 200  # noqa: PT017 - most of the input is refused


@given(st.recursive(bodies, lambda inner: st.dictionaries(st.sampled_from(["header", "nonce"]).map(str.encode), inner)))
@settings(max_examples=50)
def test_any_other_value_is_the_peers_fault(value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_message(encode(value))


def test_without_a_freshness_proof_the_key_is_missing_in_a_request_and_null_in_a_response() -> None:
    without: Any = decode(REQUEST.encode())
    assert b"freshness proof" not in without[b"header"]
    with_null: Any = decode(RESPONSE.encode())
    assert with_null[b"header"][b"freshness proof"] is None
    proof = b"F" * 20
    for message in (replace(REQUEST, freshness=proof), replace(RESPONSE, freshness=proof)):
        fields: Any = decode(message.encode())
        assert fields[b"header"][b"freshness proof"] == proof


def test_a_response_names_its_request() -> None:
    assert RESPONSE.kind == b"are there messages v2 response"
    assert RESPONSE.reference == id_of(REQUEST.encode())
    assert RESPONSE.failure is None


def test_a_failure_is_told_in_the_mojo_header() -> None:
    failed = parse_message(failure_of(REQUEST, REQUEST_ID, "unknown message type").encode())
    assert isinstance(failed, MojoResponse)
    assert failed.failure == "unknown message type"
    without_reason = replace(failed, header={b"result": b"failure", b"reason": 5})
    assert without_reason.failure == "no reason given"


def changed(message: MojoRequest | MojoResponse, place: bytes, **changes: Any) -> bytes:
    """The message with keys changed; `...` removes one."""
    fields: Any = decode(message.encode())
    where = fields if place == b"" else fields[place]
    for name, value in changes.items():
        key = name.replace("_", " ").encode()
        if value is ...:
            where.pop(key, None)
        else:
            where[key] = value
    return encode(fields)


@pytest.mark.parametrize("version", [b"0.99", b"0.9991", b"0.995", b"1", b"1.0", b"1.99"])
def test_versions_that_are_accepted(version: bytes) -> None:
    parse_message(changed(REQUEST, b"header", protocol=b"Mojo v" + version))


@pytest.mark.parametrize("version", [b"0.98", b"0.9", b"2.0", b"2", b"10", b"1.", b"01", b"0.99x", b"", b"1.999999999"])
def test_versions_that_are_refused(version: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"is not Mojo v0\.99"):
        parse_message(changed(REQUEST, b"header", protocol=b"Mojo v" + version))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (encode([]), "the message must be a dictionary"),
        (encode({}), "'header' must be a dictionary"),
        (changed(REQUEST, b"", message_body=...), "'message body' must be a dictionary"),
        (changed(REQUEST, b"message body", mojo_message=...), "must have a 'mojo message'"),
        (changed(REQUEST, b"message body", mojo_header=3), "'mojo header' must be a dictionary"),
        (changed(REQUEST, b"header", protocol=...), "'protocol' must be an octet string"),
        (changed(REQUEST, b"header", message_type=b""), "'message type' must have 1 to 64 octets"),
        (changed(REQUEST, b"header", message_type=b"x" * 65), "'message type' must have 1 to 64 octets"),
        (changed(REQUEST, b"header", nonce=bytes(19)), "'nonce' must be 20 octets"),
        (changed(REQUEST, b"header", nonce=None), "'nonce' must be 20 octets"),
        (changed(REQUEST, b"header", nonce=...), "'reference' must be 20 octets"),
        (changed(REQUEST, b"header", recipient=b"R" * 27), "'recipient' must be 20 octets"),
        (changed(REQUEST, b"header", freshness_proof=b"x"), "'freshness proof' must be 20 octets"),
        (changed(RESPONSE, b"header", message_type=b"x"), "must end in ' response'"),
        (changed(RESPONSE, b"header", reference=bytes(21)), "'reference' must be 20 octets"),
    ],
)
def test_what_a_message_must_have(data: bytes, problem: str) -> None:
    with pytest.raises(RemoteProtocolError, match=problem):
        parse_message(data)


def test_unknown_keys_are_ignored_and_missing_optional_ones_are_empty() -> None:
    assert parse_message(changed(REQUEST, b"header", colour=b"red")) == REQUEST
    assert parse_message(changed(REQUEST, b"message body", mojo_header=...)) == REQUEST
    assert parse_message(changed(REQUEST, b"header", freshness_proof=None)) == REQUEST
    body = parse_message(changed(RESPONSE, b"message body", mojo_message=...)).body
    assert body is None


def test_hints_are_a_bit_mask() -> None:
    assert [int(hint) for hint in MessageHint] == [1, 2, 4, 8, 16]
