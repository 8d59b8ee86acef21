"""One-time codes: both ends derive the same keys, and people may type them carelessly."""

from __future__ import annotations

import pytest

from tunneld.errors import UsageError
from tunneld.tls.one_time import ALPHABET, LENGTH, OneTimeCode

CODE = "K7QF-2M9D-X03A-TT4R-8WNH"


def test_the_code_in_the_manual() -> None:
    code = OneTimeCode.parse(CODE)
    assert code.ticket == "u_hf59hMJ9vHGfbTzZIDc35dYTs"
    assert str(code.host.id) == "XDersr0kGY5sUAF_9MkRSnOXXv8"
    assert str(code.visitor.id) == "AIkMrUDcyP2dksiJqT6WiEXcg3s"


def test_a_new_code_has_100_random_bits() -> None:
    codes = {OneTimeCode.create().symbols for _ in range(100)}
    assert len(codes) == 100
    assert all(len(code) == LENGTH and set(code) <= set(ALPHABET) for code in codes)
    assert len(ALPHABET) ** LENGTH == 2**100


@pytest.mark.parametrize(
    "text", [CODE, CODE.lower(), CODE.replace("-", ""), CODE.replace("-", " "), "k7qf2m9dxO3att4r8wnh"]
)
def test_ways_to_type_it(text: str) -> None:
    assert str(OneTimeCode.parse(text)) == CODE


def test_letters_that_look_like_digits() -> None:
    assert OneTimeCode.parse("ILO" + CODE[3:]) == OneTimeCode.parse("110" + CODE[3:])


@pytest.mark.parametrize("text", ["", CODE[:-1], CODE + "A", CODE.replace("K", "U"), CODE.replace("K", "é")])
def test_other_texts(text: str) -> None:
    with pytest.raises(UsageError, match="not a code"):
        OneTimeCode.parse(text)


def test_the_code_is_not_printed_by_accident() -> None:
    assert "K7QF" not in repr(OneTimeCode.parse(CODE))
