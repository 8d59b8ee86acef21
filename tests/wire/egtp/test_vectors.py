"""The known answers of vectors.txt about everything but the envelope; mesgen/test_vectors.py has the rest of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tunneld.wire import mencode
from tunneld.wire.egtp.ids import id_of, to_sixbit
from tunneld.wire.egtp.messages import MojoRequest, parse_message
from tunneld.wire.egtp.packing import deflate
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES, MailQuery

LINES = [line for line in Path(__file__).with_name("vectors.txt").read_text().splitlines() if line[:1] not in ("", "#")]
VECTORS: dict[str, str] = dict(tuple(line.split(" = ", 1)) for line in LINES)  # type: ignore[misc]


def starting(word: str) -> list[str]:
    return [name for name in VECTORS if name.startswith(word)]


def from_python_2(text: str) -> Any:
    """The value of a Python 2 expression: strings are octets, and long integers end in L."""
    return ast.literal_eval(re.sub(r"('[^']*')", r"b\1", re.sub(r"(\d)L\b", r"\1", text)))


def test_every_vector_is_read_once() -> None:
    assert len(VECTORS) == len(LINES) == 49


@pytest.mark.parametrize("name", starting("mencode "))
def test_mencode(name: str) -> None:
    value, encoded = from_python_2(name.removeprefix("mencode ")), VECTORS[name].encode()
    assert mencode.encode(value) == encoded
    assert mencode.decode(encoded) == value


@pytest.mark.parametrize("name", starting("mdecode "))
def test_mdecode(name: str) -> None:
    """All are errors here, too; a blank before a length is one that the original accepts."""
    error = VECTORS[name].removeprefix("ERROR ")
    assert error in ("MencodeError", "UnknownTypeError", "None")
    with pytest.raises(mencode.UnknownTypeError if error == "UnknownTypeError" else mencode.MencodeError):
        mencode.decode(name.removeprefix("mdecode ").encode())


def test_ids() -> None:
    assert to_sixbit(bytes(range(0x14))).decode() == VECTORS["mojosixbit 00..13"]
    assert to_sixbit(id_of(b"hello")).decode() == VECTORS['id of "hello"']


def test_the_first_message_of_a_node() -> None:
    """The original polls its relay."""
    (name,) = starting("initial ")
    assert name == 'initial "are there messages v2" recipient=52*20 nonce=4e*20 no freshness'
    request = MojoRequest(ARE_THERE_MESSAGES, b"\x52" * 20, b"\x4e" * 20, MailQuery().encode())
    assert request.encode() == VECTORS[name].encode()
    assert parse_message(VECTORS[name].encode()) == request
    assert id_of(request.encode()).hex() == VECTORS["its message id"]


def test_compression() -> None:
    assert deflate(b"").hex().startswith(VECTORS["zlib level-3 2-byte header"])
