"""Requests, replies and lines of the control protocol."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import LocalProtocolError, RemoteProtocolError, UsageError
from tunneld.wire.lines import (
    MAX_LINE,
    MAX_REPLY_LINE,
    ControlRequest,
    Err,
    Item,
    ItemLine,
    LineBuffer,
    Ok,
    format_err,
    format_item,
    format_ok,
    format_request,
    parse_reply,
    parse_request,
)


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b"list", ControlRequest("list")),
        (b"OpenTunnel\r\n", ControlRequest("opentunnel")),
        (b"  list  \n", ControlRequest("list")),
        (b"list\t--all", ControlRequest("list", ("--all",))),
        (b"openTunnel tcp persist=yes", ControlRequest("opentunnel", ("tcp",), {"persist": "yes"})),
        (b"openTunnel persist=yes tcp", ControlRequest("opentunnel", ("tcp",), {"persist": "yes"})),
        (b"getTunnelAddress tcp://h:1", ControlRequest("gettunneladdress", ("tcp://h:1",))),
        (b"close tcp://h:1/?a=b", ControlRequest("close", ("tcp://h:1/?a=b",))),
        (b"openTunnel name='my server'", ControlRequest("opentunnel", (), {"name": "my server"})),
        (b'openTunnel "name=my server"', ControlRequest("opentunnel", (), {"name": "my server"})),
        (b"openTunnel name=a=b", ControlRequest("opentunnel", (), {"name": "a=b"})),
        (b"openTunnel name=", ControlRequest("opentunnel", (), {"name": ""})),
        (b"openTunnel Name=x 2x=1 =1", ControlRequest("opentunnel", ("Name=x", "2x=1", "=1"))),
        (b"close ''", ControlRequest("close", ("",))),
        (b"openTunnel name=#1", ControlRequest("opentunnel", (), {"name": "#1"})),
        ("openTunnel name=Zoë".encode(), ControlRequest("opentunnel", (), {"name": "Zoë"})),
    ],
)
def test_a_request_is_parsed_like_a_shell_command(line: bytes, request_: ControlRequest) -> None:
    assert parse_request(line) == request_


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "line is empty; type help"),
        (b" \t ", "line is empty"),
        (b"close 'x", "unclosed quote; quote as in a shell"),
        (b"close x\\", "backslash with nothing after it"),
        (b"openTunnel ttl=1 ttl=2", "option 'ttl' is given twice; give it once"),
        (b"close \xff", "not UTF-8: byte 6 is 0xff; send UTF-8"),
        (b"close a\0b", "control character U+0000; send printable text"),
        (b"list\nlist", "control character U+000A"),
        (b"list\r\r\n", "control character U+000D"),
        (b"close \x1b[2J", "control character U+001B"),
        ("close \x85".encode(), "control character U+0085"),
        (b"close 'a\tb'", "tab inside quotes"),
        (b"@list", "not a verb: '@list'; start the line with a verb; help lists them"),
        (b"'' x", "not a verb"),
        ("Ünder".encode(), "not a verb"),
    ],
)
def test_a_malformed_request_is_refused_with_what_to_do(line: bytes, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_request(line)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ControlRequest("close", ("a=b",)), "would be parsed as the option a"),
        (ControlRequest("close", ("a\nb",)), "control characters cannot be sent"),
        (ControlRequest("open", (), {"name": "a\tb"}), "control characters cannot be sent"),
        (ControlRequest("open", (), {"Name": "x"}), "not an option name: 'Name'"),
        (ControlRequest("", ("x",)), "not a verb"),
        (ControlRequest("two words"), "not a verb"),
        (ControlRequest("close", ("\udcff",)), "only UTF-8 text can be sent"),
        (
            ControlRequest("close", ("x" * MAX_LINE,)),
            f"request of {MAX_LINE + 6} bytes is longer than {MAX_LINE} bytes",
        ),
    ],
)
def test_what_a_request_cannot_contain_is_refused_before_it_is_sent(request_: ControlRequest, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        format_request(request_)
    assert message in str(refused.value)


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"])), max_size=5))
def test_a_request_can_be_pasted_into_a_shell(words: list[str]) -> None:
    words = [word.replace("=", "") for word in words]
    assert shlex.split(format_request(ControlRequest("close", tuple(words))).decode()) == ["close", *words]


def test_values_are_quoted_as_json_only_if_necessary() -> None:
    item: Item = {
        "id": "t4",
        "up": 12,
        "age": 0.5,
        "persist": True,
        "name": 'a "b"',
        "none": None,
        "empty": "",
        "bell": "\a",
    }
    line = format_item(item)
    assert line == b'* id=t4 up=12 age=0.5 persist=yes name="a \\"b\\"" empty="" bell="\\u0007"\n'


@given(st.text())
def test_no_value_breaks_a_line_and_each_round_trips(text: str) -> None:
    line = format_item({"value": text})
    assert line.decode().splitlines() == [line.decode().rstrip("\n")]
    assert line[:-1].decode().isprintable()
    assert parse_reply(line) == ItemLine({"value": text})


@given(st.text(min_size=1))
def test_a_quoted_value_is_plain_json(text: str) -> None:
    value = format_item({"value": text + " "})[:-1].removeprefix(b"* value=")
    assert json.loads(value) == text + " "


@given(st.text())
def test_free_text_never_breaks_its_line(text: str) -> None:
    for line in (format_ok(text), format_err("usage", text)):
        assert line.count(b"\n") == 1
        assert line[:-1].decode().isprintable()
        parse_reply(line)


def test_free_text_loses_only_unprintable_characters() -> None:
    assert parse_reply(format_err("usage", "a\nb\x1b[2J")) == Err("usage", "a\ufffdb\ufffd[2J")


@pytest.mark.parametrize("text", ["x" * MAX_REPLY_LINE, "\N{SNOWMAN}" * MAX_REPLY_LINE])
def test_free_text_is_truncated_to_a_readable_line(text: str) -> None:
    buffer = LineBuffer(MAX_REPLY_LINE)
    buffer.feed(format_ok(text))
    line = buffer.next_line()
    assert line is not None
    assert isinstance(parse_reply(line), Ok)
    assert MAX_REPLY_LINE - 4 < len(line) <= MAX_REPLY_LINE


def test_our_own_mistakes_are_local_errors() -> None:
    with pytest.raises(LocalProtocolError, match="not an error code"):
        format_err("No Code", "")
    with pytest.raises(LocalProtocolError, match="keys of an item"):
        format_item({"a b": 1})
    with pytest.raises(LocalProtocolError, match="longer than"):
        format_item({"a": "x" * MAX_REPLY_LINE})


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"HTTP/1.1 400 Bad Request",
        b"SSH-2.0-OpenSSH_9.2",
        b"ok",
        b"OK\xff",
        b"ERR",
        b"ERR Usage x",
        b"* a",
        b"* a=1  b=2",
        b"* a=1 a=2",
        b'* a="1',
        b'* a="\\x"',
        b'* a="1"b=2',
        b"* A=1",
        b'* a=b"c"',
    ],
)
def test_a_malformed_reply_is_an_error_of_the_peer(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_reply(line)


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        (b"OK\r\n", Ok()),
        (b"OK ", Ok()),
        (b"OK tcp://h:1", Ok("tcp://h:1")),
        (b"ERR limit", Err("limit")),
        (b"ERR no-such-tunnel no tunnel t4", Err("no-such-tunnel", "no tunnel t4")),
        (b"*", ItemLine({})),
        (b"* ", ItemLine({})),
        (b"* a= b=1", ItemLine({"a": "", "b": "1"})),
    ],
)
def test_replies_are_parsed(line: bytes, reply: object) -> None:
    assert parse_reply(line) == reply


def test_the_longest_line_is_accepted_and_a_longer_one_is_not() -> None:
    for end in (b"\n", b"\r\n"):
        buffer = LineBuffer()
        buffer.feed(b"x" * MAX_LINE + end)
        assert buffer.next_line() == b"x" * MAX_LINE
        buffer.feed(b"x" * (MAX_LINE + 1) + end)
        with pytest.raises(RemoteProtocolError, match="longer than 4096 bytes"):
            buffer.next_line()


def test_an_endless_line_does_not_hide_the_lines_before_it() -> None:
    buffer = LineBuffer(10)
    buffer.feed(b"list\nstatus\n" + b"x" * 12)
    assert [buffer.next_line(), buffer.next_line()] == [b"list", b"status"]
    for _ in range(2):  # every later call raises too
        with pytest.raises(RemoteProtocolError):
            buffer.next_line()
