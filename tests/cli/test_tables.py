"""Records of the control protocol as text for people, for awk and for jq."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.cli.common import printable
from tunneld.cli.tables import (
    TUNNELS,
    VISITORS,
    Form,
    advertised,
    facts,
    for_people,
    short_columns,
    table,
    visitor_columns,
)
from tunneld.cli.verbs import event_line, split_words
from tunneld.errors import UsageError

RECORDS = [
    {"visitor": "203.0.113.5:4242", "up": "79", "down": "1234567", "age": "185"},
    {"visitor": "[2001:db8::1]:9", "up": "0", "down": "5", "age": "0"},
]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("up", "2048", "2.0 KiB"),
        ("age", "185", "3m05s"),
        ("expires", "185", "3m05s"),
        ("expires", "-1", "expired"),
        ("served", "2048", "2048"),
        ("age", "-", "-"),
        ("up", "\u00b2", "\u00b2"),
    ],
)
def test_sizes_and_times_are_formatted_for_people(key: str, value: str, text: str) -> None:
    assert for_people(key, value) == text


def test_a_table_is_aligned_with_numbers_on_the_right() -> None:
    assert table(RECORDS, visitor_columns(RECORDS), Form.PEOPLE) == (
        "VISITOR             UP     DOWN    AGE\n"
        "203.0.113.5:4242  79 B  1.2 MiB  3m05s\n"
        "[2001:db8::1]:9    0 B      5 B     0s\n"
    )  # fmt: skip


def test_fields_are_raw_tab_separated_and_without_headings() -> None:
    assert table(RECORDS, VISITORS, Form.FIELDS) == (
        "203.0.113.5:4242\t79\t1234567\t185\t\t\n[2001:db8::1]:9\t0\t5\t0\t\t\n"
    )


def test_json_has_numbers_and_booleans() -> None:
    (line,) = table([{"id": "t1", "name": "007", "persist": "yes", "up": "5"}], TUNNELS, Form.JSON).splitlines()
    assert json.loads(line) == {"id": "t1", "name": "007", "persist": True, "up": 5}


def test_the_short_table_fits_a_terminal_and_has_no_keys() -> None:
    blog = {
        "id": "t1", "name": "blog", "client": "https://blog.t.example.org/", "owner": "home@192.0.2.1:4",
        "phase": "ready",
        "server": "webmuxs://t.example.org:7012/secret", "visitors": "2", "waiting": "0", "refused": "0",
        "up": "1234567", "down": "12345678", "age": "11111",
    }  # fmt: skip
    shown = table([blog, blog], short_columns([blog, blog], 80), Form.PEOPLE)
    assert max(map(len, shown.splitlines())) <= 80
    assert "secret" not in shown
    assert "OWNER" not in shown
    work = {**blog, "owner": "work@192.0.2.1:5", "refused": "3"}
    heading = table([blog, work], short_columns([blog, work], 200), Form.PEOPLE).splitlines()[0]
    assert {"OWNER", "REFUSED"} <= set(heading.split())
    assert "WAITING" not in heading


def test_a_narrow_terminal_gets_fewer_columns_and_the_address_that_a_browser_needs() -> None:
    long = {
        "id": "t123", "name": "a-rather-long-name", "client": "tcp://relay.example.org:20010", "phase": "ready",
        "url": "http://relay.example.org:20010/", "visitors": "12", "up": "1234567", "down": "12345678", "age": "11111",
    }  # fmt: skip
    shown = advertised([long])
    lines = table(shown, short_columns(shown, 80), Form.PEOPLE).splitlines()
    assert lines[1].split() == ["t123", "a-rather-long-name", "http://relay.example.org:20010/", "ready", "12"]
    assert "12M" not in lines[1]
    assert len(table(shown, short_columns(shown, 120), Form.PEOPLE).splitlines()[1].split()) > len(lines[1].split())
    assert short_columns(shown, 1)[0].key == "id"


@given(st.dictionaries(st.sampled_from([column.key for column in TUNNELS]), st.text()), st.sampled_from(Form))
def test_a_record_is_one_line_without_control_characters(record: dict[str, str], form: Form) -> None:
    lines = table([record], TUNNELS, form).split("\n")
    assert len(lines) == (3 if form is Form.PEOPLE else 2)
    assert not any(ord(char) < 32 and char != "\t" for line in lines for char in line)
    if form is Form.FIELDS:
        assert lines[0].count("\t") == len(TUNNELS) - 1


def test_facts_are_a_line_for_each_key() -> None:
    record = {"uptime": "185", "max_descriptors": "1024"}
    assert facts(record, Form.PEOPLE) == "uptime           3m05s\nmax descriptors  1024\n"
    assert facts(record, Form.FIELDS) == "uptime\t185\nmax_descriptors\t1024\n"


def test_printable_escapes_control_characters() -> None:
    assert printable("a\x1b[2Jb\tc\u202e") == r"a\x1b[2Jb\tc\u202e"


def test_an_event_is_one_line() -> None:
    event = {"time": "2026-01-02T03:04:05.678+00:00", "event": "left", "id": "t1", "from": "203.0.113.5:1", "up": "7"}
    assert event_line(event, Form.FIELDS) == f"{event['time']}\tleft\tt1\tfrom=203.0.113.5:1 up=7\n"
    assert event_line(event, Form.PEOPLE).endswith("  left      t1    from=203.0.113.5:1 up=7\n")
    assert json.loads(event_line(event, Form.JSON)) == {**event, "up": 7}


def test_arguments_of_open() -> None:
    assert split_words(["tcp", "persist=yes", "name=a=b"]) == (["tcp"], {"persist": "yes", "name": "a=b"})
    assert split_words([]) == ([], {})
    for words in (["tcp", "ssh"], ["ttl=1", "ttl=2"], ["=x"]):
        with pytest.raises(UsageError):
            split_words(words)
