"""mencode: canonical in both directions, limits, linear cost, errors that name the octet."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunneld.errors import LocalProtocolError
from tunneld.wire.mencode import (
    DEFAULT_LIMITS,
    MencodeError,
    MencodeLimits,
    UnknownTypeError,
    UnknownValue,
    decode,
    encode,
)

keys = st.one_of(st.integers(-(2**70), 2**70), st.binary(max_size=12))
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.integers(), st.binary(max_size=30)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=8,
)


@given(values)
@settings(max_examples=60)
@example([{}, {1: [], b"": {}}, [], 0, -1, b"", None])
def test_what_was_encoded_is_decoded(value: Any) -> None:
    assert decode(encode(value)) == value


@given(st.binary(max_size=60) | st.text("()0123456789:intslrgdcu-", max_size=40).map(str.encode))
def test_garbage_is_the_peers_fault_and_what_is_accepted_is_canonical(data: bytes) -> None:
    try:
        value = decode(data)
    except MencodeError:
        return
    assert encode(value) == data


@given(values, st.data())
@settings(max_examples=60)
def test_one_wrong_octet_is_an_error_or_another_canonical_value(value: Any, data: st.DataObject) -> None:
    wrong = bytearray(encode(value))
    wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(wrong))
    except MencodeError as error:
        problem = str(error)
    else:
        assert "UnknownValue" in repr(decoded) or b"dict" in wrong or encode(decoded) == wrong
        return
    assert re.search(r"octet \d+:|unknown type", problem)


@given(values, st.data())
@settings(max_examples=60)
def test_a_value_that_is_cut_is_an_error(value: Any, data: st.DataObject) -> None:
    encoded = encode(value)
    with pytest.raises(MencodeError):
        decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "octet 0: expected the opening"),
        (b"(3:int2:01)", "octet 6: '01' is not a canonical decimal"),
        (b"(3:int2:-0)", "octet 6: '-0' is not"),
        (b"(3:int0:)", "octet 6: '' is not"),
        (b"(3:int2:+1)", "octet 6: "),
        (b"(3:int2:1 )", "octet 6: "),
        (b"(3:int2:\xd9\xa1)", "octet 6: "),
        (b"(6:string04:spam)", "octet 9: expected a length"),
        (b"(6:string5:spam)", "octet 16: expected the closing"),
        (b"(6:string9:spam)", "octet 9: 9 octets should follow, but only 5 do"),
        (b"(6:string12345678:)", "octet 9: expected a length of 1 to 7 digits"),
        (b"(6:string4:spam", "octet 15: expected the closing"),
        (b"(4:null)x", "octet 8: the value has ended, but 1 octets follow"),
        (b"(4:null1:x)", "octet 7: expected the closing"),
        (b"( 4:null)", "octet 1: expected a length"),
        (b"(4:list(4:null)", "octet 15: the data ends inside a value"),
        (b"(4:list(4:null)x)", "octet 15: expected the opening"),
        (b"(4:dict(6:string1:a)(3:int1:1)(6:string1:a)(3:int1:2))", "octet 30: .* strictly ascending"),
        (b"(4:dict(6:string1:b)(4:null)(6:string1:a)(4:null))", "octet 28: .* strictly ascending"),
        (b"(4:dict(6:string1:a)(4:null)(3:int1:1)(4:null))", "octet 28: .* strictly ascending"),
        (b"(4:dict(3:int2:10)(4:null)(3:int1:9)(4:null))", "strictly ascending"),
        (b"(4:dict(4:null)(4:null))", "octet 7: a dictionary key must be"),
        (b"(4:dict(1:x)(4:null))", "octet 7: a dictionary key must be"),
        (b"(4:dict(6:string1:a))", "expected the opening"),
        (b"(5:float3:1.0)x", "unknown type 'float'"),
        (b"(5:float3:1.0", "octet 13: the data ends"),
        (b"(5:float3:1.0(1:x)", "the data ends"),
        (b"(5:floatx)", "octet 8: expected a length"),
    ],
)
def test_an_error_names_the_octet(data: bytes, error: str) -> None:
    with pytest.raises(MencodeError, match=error):
        decode(data)


def test_an_unknown_type_is_an_error_a_marker_or_skipped() -> None:
    unknown = b"(5:float3:1.0(1:x()4:data))"
    with pytest.raises(UnknownTypeError):
        decode(unknown)
    assert decode(b"(4:list%b(4:null))" % unknown) == [UnknownValue(b"float"), None]
    assert decode(b"(4:dict(6:string1:a)%b(6:string1:b)(3:int1:1))" % unknown) == {b"b": 1}
    with pytest.raises(MencodeError, match="ascending"):
        decode(b"(4:dict(6:string1:b)%b(6:string1:a)(3:int1:1))" % unknown)
    with pytest.raises(LocalProtocolError, match="no type for UnknownValue"):
        encode([UnknownValue(b"float")])


@pytest.mark.parametrize("value", [True, 1.5, "text", bytearray(b"x"), {"a": 1}, {True: 1}, {None: 1}, [object()]])
def test_what_has_no_type_is_not_encoded(value: Any) -> None:
    with pytest.raises(LocalProtocolError):
        encode(value)


# Limits: the same in both directions


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {1: value}])
def test_depth_is_limited(wrap: Any) -> None:
    deepest = wrap(nested(DEFAULT_LIMITS.depth - 1))
    assert decode(encode(deepest)) == deepest
    with pytest.raises(LocalProtocolError, match="deeper than 32"):
        encode(wrap(deepest))
    more = MencodeLimits(depth=DEFAULT_LIMITS.depth + 1)
    with pytest.raises(MencodeError, match="deeper than 32"):
        decode(encode(wrap(deepest), more))


def test_the_depth_of_unknown_values_is_limited() -> None:
    with pytest.raises(UnknownTypeError):
        decode(b"(1:x" + b"(" * 31 + b")" * 32)
    with pytest.raises(MencodeError, match="octet 35: nested deeper than 32"):
        decode(b"(1:x" + b"(" * 32 + b")" * 33)


def test_digits_are_limited() -> None:
    for largest in (10**78 - 1, -(10**78) + 1):
        assert decode(encode(largest)) == largest
    for larger in (10**78, -(10**78), 10**10_000):
        with pytest.raises(LocalProtocolError, match="more than 78 digits"):
            encode(larger)
    with pytest.raises(MencodeError, match="octet 6: integer has more than 78"):
        decode(b"(3:int79:%d)" % 10**78)


def test_the_number_of_values_is_limited() -> None:
    limits = MencodeLimits(values=4)
    assert decode(encode([None, [1]], limits), limits) == [None, [1]]
    with pytest.raises(LocalProtocolError, match="more than 4 values"):
        encode([None, [1, 2]], limits)
    with pytest.raises(MencodeError, match="octet 32: more than 4 values"):
        decode(encode([None, [1, 2]]), limits)
    with pytest.raises(MencodeError, match="more than 4 values"):
        decode(b"(1:x0:0:0:0:0:)", limits)


class _Counting(bytes):
    """Octets that count how many of them were copied out."""

    copied = 0

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        type(self).copied += len(part) if isinstance(part, bytes) else 1
        return part


@pytest.mark.parametrize(
    "data",
    [
        encode([bytes(100_000), b"x" * 100_000]),
        encode({b"k%06d" % number: number for number in range(5000)}),
        encode(nested(32)),
        b"(1:x" + b"100:" * 20_000,
        b"(4:list" * 30_000,
        b"(4:list" + b"(1:x9999999:" * 20_000,
    ],
)
def test_each_octet_is_copied_at_most_twice(data: bytes) -> None:
    _Counting.copied = 0
    counted = _Counting(data)
    with contextlib.suppress(MencodeError):
        decode(counted)
    assert _Counting.copied <= 2 * len(data) + 10
