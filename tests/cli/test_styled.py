"""Lines with styles: their width, and how they are fitted to a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.cli.styled import BOLD, PLAIN, align, has_colours, join, render, text_width, width, wrap


def plain(*texts: str) -> list[tuple[str, str]]:
    return [(text, PLAIN) for text in texts]


def shown(lines: list[object]) -> list[str]:
    return [render(line, colours=False).rstrip() for line in lines]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_colours_are_the_choice_of_the_user(environment: dict[str, str], expected: bool) -> None:
    assert has_colours(environment) is expected


def test_a_style_surrounds_its_text_and_controls_are_escaped() -> None:
    assert render([("a", BOLD), ("\x1b[31m", BOLD), ("b", PLAIN), ("", BOLD)], colours=True) == (
        "\x1b[1ma\x1b[m\x1b[1m\\x1b[31m\x1b[mb"
    )
    assert render([("a", BOLD)], colours=False) == "a"


def test_wide_characters_take_two_columns_and_marks_none() -> None:
    assert [text_width(text) for text in ("abc", "日本", "e\u0301", "🚇")] == [3, 4, 1, 2]
    assert width([("a\n", PLAIN)]) == 3  # as it is printed: \n


def test_cells_for_which_there_is_no_room_are_left_out_whole() -> None:
    cells = plain("3 now", "40 served", "1 failed")
    assert render(join(cells, 28), colours=False) == "3 now   40 served   1 failed"
    assert render(join(cells, 27), colours=False) == "3 now   40 served"
    assert render(join(cells, 2), colours=False) == "3 now"


def test_a_sentence_is_wrapped_between_words() -> None:
    assert shown([*wrap("could not connect to relay", 16, indent="  ")]) == ["  could not", "  connect to", "  relay"]


def test_a_table_is_aligned_and_keeps_the_columns_that_fit() -> None:
    rows = [plain("blog", "1.2 KiB", "finished"), plain("x", "3 B"), plain("longer", "1 B", "")]
    assert shown([*align(rows, 80, frozenset({1}))]) == [
        "blog     1.2 KiB   finished",
        "x            3 B",
        "longer       1 B",
    ]
    assert shown([*align(rows, 20)]) == ["blog     1.2 KiB", "x        3 B", "longer   1 B"]
    assert align([], 80) == []


@given(st.lists(st.lists(st.text(max_size=5), min_size=1, max_size=4), max_size=4), st.integers(1, 40))
def test_a_table_is_never_wider_than_the_terminal_unless_its_first_column_is(
    rows: list[list[str]], columns: int
) -> None:
    first = max((width([(row[0], PLAIN)]) for row in rows), default=0)
    for line in align([plain(*row) for row in rows], columns):
        assert width(line) <= max(columns, first)
