"""Lines with styles for terminals: how wide they are, how they are fitted to a width, and how they are written. Pure.

A line is a sequence of spans; a span is a text and its style, the parameters of an SGR sequence (ECMA-48 §8.3.117).
Texts may come from a peer, so `render` escapes what does not print.
"""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from tunneld.cli.common import printable

Span = tuple[str, str]
"""A text and its style."""
Line = Sequence[Span]

PLAIN, BOLD, DIM, REVERSE, RED, GREEN, YELLOW = "", "1", "2", "7", "31", "32", "33"
GAP = "   "
"""Between two cells."""


def has_colours(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user wants colours: see https://no-color.org/."""
    return not environment.get("NO_COLOR") and environment.get("TERM", "dumb") != "dumb"


def render(line: Line, *, colours: bool) -> str:
    """The text to write, without a line end."""
    return "".join(
        f"\x1b[{style}m{printable(text)}\x1b[m" if colours and style and text else printable(text)
        for text, style in line
    )


def width(line: Line) -> int:
    """The columns that a line takes on a terminal."""
    return sum(text_width(printable(text)) for text, _ in line)


def text_width(text: str) -> int:
    """The columns of a text that prints: wide characters take two, marks on the character before take none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def join(cells: Iterable[Span], columns: int, indent: str = "") -> Line:
    """One line of these cells, without the last ones for which there are not enough columns."""
    line: list[Span] = [(indent, PLAIN)] if indent else []
    used = len(indent)
    for index, cell in enumerate(cells):
        gap = GAP if index else ""
        used += len(gap) + width([cell])
        if index and used > columns:
            break
        line += [(gap, PLAIN), cell] if gap else [cell]
    return line


def wrap(text: str, columns: int, style: str = PLAIN, indent: str = "") -> list[Line]:
    """A sentence in as many lines as it needs. Words are cut only if they are longer than a line."""
    room = max(1, columns - len(indent))
    found = textwrap.wrap(printable(text), room, break_on_hyphens=False) or [""]
    return [[(indent, PLAIN), (part, style)] if indent else [(part, style)] for part in found]


def with_text(line: Line, text: Span, columns: int) -> Line:
    """Add a text to a line; where it does not fit, as many of its words as do, and an ellipsis."""
    room = columns - width(line) - len(GAP)
    if not text[0] or room <= 0:
        return line
    if width([text]) <= room:
        return [*line, (GAP, PLAIN), text]
    words = text[0].split()
    while words and text_width(printable(" ".join(words))) >= room:
        words.pop()
    return [*line, (GAP, PLAIN), (f"{' '.join(words)}…", text[1])] if words else line


def align(
    rows: Sequence[Sequence[Span]],
    columns: int,
    right: frozenset[int] = frozenset(),
    *,
    gap: str = GAP,
    ranks: Sequence[int] | None = None,
) -> list[Line]:
    """Rows of cells as a table; `right` has the columns that are aligned on the right.

    Columns for which there is no room are left out, whole: the last one first, or the one with the highest of `ranks`.
    """
    widths = [max(width([cell]) for cell in column) for column in zip_longest(*rows, fillvalue=("", PLAIN))]
    kept = list(range(len(widths)))
    while len(kept) > 1 and sum(widths[index] for index in kept) + len(gap) * (len(kept) - 1) > columns:
        kept.remove(max(kept, key=lambda index: (ranks[index] if ranks else 0, index)))
    return [_aligned(row, [(index, widths[index]) for index in kept if index < len(row)], right, gap) for row in rows]


def _aligned(row: Sequence[Span], kept: Sequence[tuple[int, int]], right: frozenset[int], gap: str) -> Line:
    line: list[Span] = []
    for index, room in kept:
        text, style = row[index]
        pad = " " * (room - width([row[index]]))
        before, after = (pad, "") if index in right else ("", pad)
        line += [((gap if line else "") + before, PLAIN), (text, style), (after, PLAIN)]
    return [span for span in line if span[0]]
