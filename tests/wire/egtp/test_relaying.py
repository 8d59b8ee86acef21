"""Bodies of relay messages: round trips, synonyms, every form of a response."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.ids import to_sixbit
from tunneld.wire.egtp.relaying import (
    Mail,
    MailQuery,
    PassAlong,
    RetrieveMessages,
    WaitingMessage,
    canonical_kind,
    encode_retrieved,
    failure,
    parse_mail,
    parse_mail_query,
    parse_message_for_you,
    parse_outcome,
    parse_pass_along,
    parse_retrieve,
    success,
)
from tunneld.wire.mencode import decode, encode

ids = st.binary(min_size=20, max_size=20)
envelopes = st.binary(max_size=40)
waiting = st.builds(WaitingMessage, ids, ids, st.integers(0, 2**22))
ALICE, MESSAGE_ID = b"A" * 20, b"M" * 20


def sent(body: Any) -> Any:
    return decode(encode(body))


@given(st.builds(PassAlong, ids, envelopes, st.integers(-1, 99)))
@settings(max_examples=30)
def test_pass_along(body: PassAlong) -> None:
    assert parse_pass_along(sent(body.encode())) == body


@given(st.builds(MailQuery, st.integers(0, 9), st.booleans()))
@settings(max_examples=20)
def test_mail_query(body: MailQuery) -> None:
    assert parse_mail_query(sent(body.encode())) == body


@given(st.builds(RetrieveMessages, st.lists(waiting, max_size=3).map(tuple), st.integers(0, 2**30)))
@settings(max_examples=30)
def test_retrieve_messages(body: RetrieveMessages) -> None:
    assert parse_retrieve(sent(body.encode())) == body


@given(
    st.builds(Mail, messages=st.lists(envelopes, max_size=3).map(tuple))
    | st.builds(Mail, waiting=st.lists(waiting, max_size=3).map(tuple))
)
@settings(max_examples=40)
def test_mail(body: Mail) -> None:
    assert parse_mail(sent(body.encode())) == body
    assert parse_mail(sent(encode_retrieved(body.messages))).messages == body.messages


@pytest.mark.parametrize("name", ["pass this along", "are there messages", "retrieve messages", "list relay servers"])
def test_types_without_v2_are_synonyms(name: str) -> None:
    current = f"{name} v2".encode()
    assert canonical_kind(name.encode()) == canonical_kind(current) == current
    assert canonical_kind(b"message for you") == b"message for you"


def test_the_body_that_the_original_sends() -> None:
    assert MailQuery().encode() == {b"response version": 3, b"enable fast relay": 1}
    assert parse_mail_query({}) == MailQuery(0, fast_relay=False)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (success(), None),
        ({b"result": b"ok"}, None),
        (failure("mailbox full"), "mailbox full"),
        ({b"result": b"failure"}, "no reason given"),
    ],
)
def test_outcomes(body: Any, reason: str | None) -> None:
    assert parse_outcome(body) == reason


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ([b"one", b"two"], (b"one", b"two")),
        ([{b"message": b"one"}, b"two"], (b"one", b"two")),
        ({b"messages": [b"one"]}, (b"one",)),
        ({b"messages attached": [b"one"]}, (b"one",)),
        ({b"messages attached v2": [{b"message": b"one"}]}, (b"one",)),
        ({b"result": b"no"}, ()),
        ({b"status": b"no messages"}, ()),
        ({b"result": b"yes", b"number of messages": 1, b"total bytes": 9}, ()),
        ([], ()),
    ],
)
def test_every_form_of_messages(body: Any, messages: tuple[bytes, ...]) -> None:
    assert parse_mail(body) == Mail(messages)


def test_information_counts_the_messages() -> None:
    mail = Mail(waiting=(WaitingMessage(ALICE, MESSAGE_ID, 10), WaitingMessage(ALICE, ALICE, 5)))
    body: Any = mail.encode()
    assert (body[b"result"], body[b"number of messages"], body[b"total bytes"]) == (b"yes", 2, 15)
    assert body[b"messages info"][0][b"sender id"] == to_sixbit(ALICE)


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (parse_outcome, None),
        (parse_outcome, {b"result": b"maybe"}),
        (parse_outcome, {b"result": b"failure", b"reason": 3}),
        (parse_pass_along, b"x"),
        (parse_pass_along, {b"recipient": b"x", b"message": b""}),
        (parse_pass_along, {b"recipient": ALICE}),
        (parse_pass_along, {b"recipient": ALICE, b"message": b"", b"comm strat sequence num": -2}),
        (parse_mail_query, []),
        (parse_mail_query, {b"response version": b"3"}),
        (parse_mail, 7),
        (parse_mail, {}),
        (parse_mail, [None]),
        (parse_mail, [b""] * 4097),
        (parse_mail, {b"result": b"yes", b"messages info": [{b"sender id": ALICE}]}),
        (parse_retrieve, {b"messages": [b"x"], b"bytes": 1}),
        (parse_retrieve, {b"messages": [], b"bytes": -1}),
        (parse_message_for_you, None),
        (parse_message_for_you, {b"message": 1}),
    ],
)
def test_anything_else_is_the_peers_fault(parse: Any, body: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="EGTP message: "):
        parse(body)
