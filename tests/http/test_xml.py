"""XML-RPC: parsing of calls and formatting of answers."""

from __future__ import annotations

import re
import xmlrpc.client
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.http.xml import ARRAY_BEGIN, ARRAY_END, format_answer, format_fault, format_value, parse_call
from tunneld.wire.lines import Item

BILLION_LAUGHS = b"""<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><methodCall><methodName>&c;</methodName></methodCall>"""
OUTSIDE = b'<!DOCTYPE x SYSTEM "file:///etc/hostname"><methodCall><methodName>list</methodName></methodCall>'


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("openTunnel", ()),
        ("tunnel.openTunnel", ("tcp", {"persist": True, "ttl": 60, "name": "büro"})),
        ("tunnel.getTunnelAddress", ("tcp://127.0.0.1:8010",)),
        ("x", (1, -1, 2.5, True, "", [1, ["a"]], {"a": {"b": 1}}, b"bytes")),
    ],
)
def test_calls_of_the_stock_client_are_parsed(method: str, params: tuple[Any, ...]) -> None:
    assert parse_call(xmlrpc.client.dumps(params, method).encode()) == (method, params)


def test_the_call_in_the_protocol_notes_is_parsed() -> None:
    call = """<?xml version="1.0"?><methodCall><methodName>tunnel.getTunnelAddress</methodName><params><param>
    <value><string>tcp://tristero.sourceforge.net:8010</string></value></param></params></methodCall>"""
    assert parse_call(call.encode()) == ("tunnel.getTunnelAddress", ("tcp://tristero.sourceforge.net:8010",))


def test_a_value_without_a_type_is_a_string_in_any_encoding() -> None:
    call = (
        '<?xml version="1.0" encoding="iso-8859-1"?><methodCall><methodName>show</methodName>'
        "<params><param><value>b\xfcro</value></param></params></methodCall>"
    )
    assert parse_call(call.encode("latin-1")) == ("show", ("büro",))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no element found"),
        (b"<methodCall>", "no element found"),
        (b"<methodCall><methodName>x</methodCall>", "mismatched tag"),
        (b"<methodCall></methodCall>", "structure"),
        (b"<methodCall><methodName> </methodName></methodCall>", "no method name"),
        (b"<methodResponse><params/></methodResponse>", "no method name"),
        (xmlrpc.client.dumps(xmlrpc.client.Fault(1, "no")).encode(), "structure"),
        (b"<methodCall><methodName>x</methodName><params><param><value><int>one</int>", "structure"),
        (b"<methodCall><methodName>x</methodName></struct></methodCall>", "mismatched"),
        (b'<?xml version="1.0" encoding="zlib"?><methodCall/>', "structure"),
        (b'<?xml version="1.0" encoding="nothing"?><methodCall/>', "structure"),
        (b"<m><methodName>x</methodName><value><int>%s</int></value></m>" % (b"9" * 5000), "structure"),
        (b"<m><methodName>x</methodName><struct><name>odd</name></struct></m>", "structure"),
        (b"<m><methodName>&a;</methodName></m>", "undefined entity"),
        (BILLION_LAUGHS, "DOCTYPE"),
        (OUTSIDE, "DOCTYPE"),
        (b"<!DOCTYPE m><methodCall><methodName>list</methodName></methodCall>", "DOCTYPE"),
    ],
)
def test_a_malformed_call_is_a_protocol_error(body: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match="not an XML-RPC call") as caught:
        parse_call(body)
    assert reason in str(caught.value)


TAGS = ["methodCall", "methodName", "params", "param", "value", "string", "int", "double", "boolean", "struct"]
TAGS += ["member", "name", "array", "data", "base64", "nil", "fault", "dateTime.iso8601", "bigdecimal", "ex:i8", "x"]
TOKENS = st.sampled_from(
    [f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS] + ["1", "x", "&lt;", " ", "1e999"]
)
TREES = st.recursive(
    st.sampled_from(["", "1", "-1", "x", "nan", "&#65;", "é"]),
    lambda inside: st.tuples(st.sampled_from(TAGS), st.lists(inside, max_size=4)).map(
        lambda pair: f"<{pair[0]}>{''.join(pair[1])}</{pair[0]}>"
    ),
    max_leaves=25,
)


def parse_or_refuse(body: bytes) -> None:
    try:
        name, params = parse_call(body)
    except RemoteProtocolError:
        return
    assert isinstance(name, str)
    assert isinstance(params, tuple)


@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error(body: bytes) -> None:
    parse_or_refuse(body)


@given(st.lists(TOKENS, max_size=30).map("".join))
def test_tags_in_any_order_are_parsed_or_refused(text: str) -> None:
    parse_or_refuse(text.encode())


@given(TREES)
def test_well_formed_nonsense_is_parsed_or_refused(text: str) -> None:
    parse_or_refuse(f"<methodCall><methodName>x</methodName><params>{text}</params></methodCall>".encode())


@given(st.text(max_size=40))
def test_any_text_can_be_formatted(text: str) -> None:
    (read,), _ = xmlrpc.client.loads(format_answer(text).decode())
    assert len(str(read)) <= len(text)
    if text.isprintable():
        assert read == text
    with pytest.raises(xmlrpc.client.Fault) as fault:
        xmlrpc.client.loads(format_fault(1, text).decode())
    assert fault.value.faultCode == 1


@pytest.mark.parametrize("number", [0, -1, 2**31 - 1, -(2**31), 2**31, 5 * 10**9, 2**53])
def test_integers_beyond_32_bits_become_doubles_of_the_same_value(number: int) -> None:
    items: list[Item] = [{"up": number}]
    answer = b"".join((ARRAY_BEGIN, *map(format_value, items), ARRAY_END))
    assert xmlrpc.client.loads(answer.decode())[0] == ([{"up": number}],)
    assert (b"<int>" in answer) == (abs(number) < 2**31 or number == -(2**31))
    assert not re.search(rb"i8|[eE]\+", answer)  # neither an extension nor an exponent, which the specification forbids


def test_none_is_omitted_and_bool_is_boolean() -> None:
    items: list[Item] = [{"name": None, "persist": True, "age": 1.5, "id": "t1"}]
    assert xmlrpc.client.loads(b"".join((ARRAY_BEGIN, *map(format_value, items), ARRAY_END)).decode())[0] == (
        [{"persist": True, "age": 1.5, "id": "t1"}],
    )
