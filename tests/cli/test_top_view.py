"""The screen of `tunnel top`: what it shows, and what its keys do."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.cli.styled import REVERSE, render, width
from tunneld.cli.tables import Record
from tunneld.cli.top_view import TopView

LIST: list[dict[str, str]] = [
    {"id": "t1", "name": "blog", "client": "tcp://192.0.2.1:20000", "owner": "alice", "visitors": "2", "age": "9"},
    {"id": "t2", "name": "shell", "client": "tcp://192.0.2.1:20001", "owner": "bob", "visitors": "1", "age": "70"},
]
SHOW: list[dict[str, str]] = [
    LIST[0],
    {"visitor": "203.0.113.5:4242", "up": "10", "down": "0"},
    {"visitor": "203.0.113.7:1234", "up": "0", "down": "5"},
]


def moved(records: list[dict[str, str]], *down: int) -> list[Record]:
    return [
        {**record, "phase": "ready", "up": "0", "down": str(each)} for record, each in zip(records, down, strict=True)
    ]


class Shown:
    """A view, its lines, and the visitors that it had disconnected."""

    def __init__(self, *, sort: str = "down_rate") -> None:
        self.kicked: list[tuple[str, str]] = []
        self.view = TopView("relay.example.org:7010", lambda *asked: self.kicked.append(asked), sort=sort)

    def lines(self, columns: int = 100, lines: int = 12) -> list[str]:
        made = self.view.lines(0.0, os.terminal_size((columns, lines)))
        assert len(made) == max(5, lines)
        assert all(width(line) <= columns for line in made[2:])
        self.chosen = [render(line, colours=False).rstrip() for line in made if line and line[0][1] == REVERSE]
        return [render(line, colours=False).rstrip() for line in made]

    def press(self, *keys: str) -> None:
        for key in keys:
            self.view.press(key)

    @property
    def ids(self) -> list[str]:
        return [line.split()[0] for line in self.lines()[3:] if line.startswith("t")]


def two_tunnels(**options: str) -> Shown:
    shown = Shown(**options)
    shown.view.update(0.0, moved(LIST, 0, 0))
    shown.view.update(2.0, moved(LIST, 1 << 10, 40 << 20))
    return shown


def test_tunnels_are_sorted_by_their_rate_which_comes_from_two_answers() -> None:
    lines = two_tunnels().lines()
    assert lines[0] == "tunnel top   2 tunnels   3 visitors   up 0 B/s   down 20 MiB/s   relay.example.org:7010"
    assert lines[2:5] == [
        "id  name   address                owner  phase  visitors   up/s  down/s ▼   up     down    age",
        "t2  shell  tcp://192.0.2.1:20001  bob    ready         1  0 B/s  20 MiB/s  0 B   40 MiB  1m10s",
        "t1  blog   tcp://192.0.2.1:20000  alice  ready         2  0 B/s   512 B/s  0 B  1.0 KiB     9s",
    ]
    assert lines[-1] == "q quit   enter visitors   / filter   ←→ sort   r reverse   ↑↓ choose"


def test_a_narrow_terminal_keeps_the_columns_that_matter() -> None:
    shown = two_tunnels()
    assert shown.lines(columns=60)[2] == "id  name   address                visitors   up/s  down/s ▼"
    assert shown.lines(columns=36)[2] == "id  name   visitors   up/s  down/s ▼"


def test_keys_sort_by_another_column_and_reverse() -> None:
    shown = two_tunnels()
    assert shown.ids == ["t2", "t1"]
    shown.press("r")
    assert shown.ids == ["t1", "t2"]
    shown.press("r", "left", "left")
    assert "visitors ▼" in shown.lines()[2]
    assert shown.ids == ["t1", "t2"]
    shown.press("left", "left")
    assert "owner ▲" in shown.lines()[2]
    assert shown.ids == ["t1", "t2"]
    assert two_tunnels(sort="age").ids == ["t2", "t1"]


def test_the_chosen_tunnel_stays_chosen_when_the_order_changes() -> None:
    shown = two_tunnels()
    shown.lines()
    shown.press("down", "down")
    shown.lines()
    assert shown.chosen[0].startswith("t1")
    shown.view.update(4.0, moved(LIST, 1 << 30, 40 << 20))
    assert shown.ids == ["t1", "t2"]
    assert shown.chosen[0].startswith("t1")
    shown.press("page up")
    shown.view.update(6.0, moved(LIST[1:], 40 << 20))
    shown.lines()
    assert shown.chosen[0].startswith("t2")


def test_a_filter_is_typed_applied_and_removed() -> None:
    shown = two_tunnels()
    shown.press("/", "B", "o", "x", "backspace")
    assert shown.lines()[1] == "filter: Bo_"
    assert shown.ids == ["t2"]
    shown.press("enter", "q")
    assert (shown.view.ended, shown.lines()[1]) == (True, "filter: Bo")
    shown.press("escape")
    assert shown.ids == ["t2", "t1"]
    shown.press("/", "z")
    assert shown.lines()[2] == "nothing passes the filter"
    shown.press("escape")
    assert shown.ids == ["t2", "t1"]


def visitors_of_blog() -> Shown:
    shown = two_tunnels()
    shown.lines()
    shown.press("down", "enter")
    assert shown.view.tunnel == "t1"
    shown.view.update(4.0, SHOW)
    return shown


def test_enter_shows_the_visitors_of_a_tunnel_and_escape_all_tunnels() -> None:
    shown = visitors_of_blog()
    lines = shown.lines()
    assert lines[0].startswith("tunnel top   t1 blog   2 visitors   up 0 B/s   down 0 B/s   tcp://192.0.2.1:20000")
    assert lines[2] == "visitor            up/s  down/s ▼    up  down  age"
    shown.press("escape")
    assert shown.ids == ["t2", "t1"]


def test_a_visitor_is_kicked_only_after_confirmation_which_shows_the_command() -> None:
    shown = visitors_of_blog()
    shown.lines()
    shown.press("down", "k")
    assert shown.lines()[1] == "disconnect 203.0.113.7:1234? y/n   tunnel kick t1 203.0.113.7:1234"
    shown.press("n")
    assert (shown.kicked, shown.lines()[1]) == ([], "")
    shown.press("k", "y")
    assert shown.kicked == [("t1", "203.0.113.7:1234")]
    assert not shown.view.ended


def test_a_kick_needs_a_visitor() -> None:
    shown = two_tunnels()
    shown.press("k", "y")
    assert (shown.kicked, shown.lines()[1]) == ([], "to disconnect a visitor, choose its tunnel with enter first")


def test_a_tunnel_that_closes_leads_back_to_all_tunnels() -> None:
    shown = visitors_of_blog()
    shown.view.gone()
    shown.view.update(6.0, moved(LIST[1:], 40 << 20))
    assert (shown.lines()[1], shown.ids) == ("tunnel t1 is closed", ["t2"])


def test_a_problem_is_shown_until_there_is_an_answer() -> None:
    shown = two_tunnels()
    shown.view.problem = "connection lost; trying again"
    assert shown.lines()[1] == "connection lost; trying again"
    shown.view.update(9.0, [])
    assert shown.lines()[1:3] == ["", "no tunnels"]


def test_the_chosen_row_is_in_sight_in_a_low_terminal() -> None:
    shown = Shown()
    shown.view.update(0.0, [{"id": f"t{number}"} for number in range(100)])
    for _ in range(60):
        shown.press("down")
        shown.lines(lines=8)
        assert len(shown.chosen) == 1


KEYS = ("up", "down", "left", "right", "page up", "page down", "enter", "escape", "backspace", "k", "y", "r", "/", "x")
RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["id", "visitor", "name", "up", "down", "age", "visitors"]), st.text(max_size=5)),
    max_size=5,
)


@given(st.lists(st.sampled_from(KEYS) | RECORDS, max_size=20), st.integers(1, 30), st.integers(1, 100))
def test_no_keys_and_no_records_make_the_view_fail(
    steps: list[str | list[dict[str, str]]], lines: int, columns: int
) -> None:
    shown = Shown()
    for now, step in enumerate(steps):
        if isinstance(step, str):
            shown.press(step)
        else:
            shown.view.update(float(now), step)
        assert len(shown.view.lines(0.0, os.terminal_size((columns, lines)))) == max(5, lines)


@pytest.mark.parametrize("key", ["é", "page down", ""])
def test_other_keys_do_nothing(key: str) -> None:
    shown = two_tunnels()
    before = shown.lines()
    shown.press(key)
    if key != "page down":
        assert shown.lines() == before
