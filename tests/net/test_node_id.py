"""Node ids: one text for each, and nothing else is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import UsageError
from tunneld.net.node_id import NodeId

COUNTING = "AAECAwQFBgcICQoLDA0ODxAREhM"  # 00, 01, ... 13


@given(st.binary(min_size=20, max_size=20))
def test_an_id_is_what_its_text_says(digest: bytes) -> None:
    assert NodeId.parse(str(NodeId(digest))) == NodeId(digest)
    assert len(str(NodeId(digest))) == 27


def test_the_text_is_that_of_egtp() -> None:
    assert str(NodeId(bytes(range(20)))) == COUNTING


@pytest.mark.parametrize(
    "text",
    [
        "",
        COUNTING[:-1],
        COUNTING + "A",
        COUNTING + "=",
        COUNTING[:-1] + "N",  # the same bytes, and a bit that means nothing
        COUNTING[:-1] + "+",
        COUNTING[:-1] + "\n",
        " " + COUNTING[1:],
        "é" * 27,
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a node id"):
        NodeId.parse(text)


def test_an_id_has_20_bytes() -> None:
    with pytest.raises(UsageError):
        NodeId(b"short")
