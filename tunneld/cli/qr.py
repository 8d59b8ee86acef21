"""An address as a QR code, in half blocks: two modules, one above the other, in one character.

The colours are set where the terminal has colours, because phones read dark modules on a light ground best. Without,
light modules are drawn, which is right on a dark ground; most phones read the opposite, too.
"""

from __future__ import annotations

from functools import lru_cache

from tunneld.cli.styled import YELLOW, Line

BORDER = 2
"""Light modules around the code; 4 by the standard, but phones do with 2."""
BLACK_ON_WHITE = "30;107"
BLOCKS = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}
"""The character for an upper and a lower module; 1 is dark. Light modules are the drawn ones."""
INVERSE = {(0, 0): " ", (0, 1): "▄", (1, 0): "▀", (1, 1): "█"}


@lru_cache(maxsize=2)
def qr_code(text: str, *, colours: bool = True) -> list[Line]:
    """The lines of the QR code. Raises `ModuleNotFoundError` where segno is not installed."""
    import segno  # noqa: PLC0415 - for the few that look at it; the single file has it, but it may be left out

    rows = [list(row) for row in segno.make(text, error="l", micro=False).matrix_iter(border=BORDER)]
    if len(rows) % 2:
        rows.append([0] * len(rows[0]))
    blocks, style = (INVERSE, BLACK_ON_WHITE) if colours else (BLOCKS, "")
    return [
        [("".join(blocks[bool(upper), bool(lower)] for upper, lower in zip(*pair, strict=True)), style)]
        for pair in zip(rows[::2], rows[1::2], strict=True)
    ]


def qr_lines(text: str, *, colours: bool) -> list[Line]:
    """The same, or a sentence why there is none."""
    try:
        return qr_code(text, colours=colours)
    except ModuleNotFoundError:
        return [[("no QR code: the Python module segno is not installed; pip install segno", YELLOW)]]
