"""SCRAM-SHA-256 against the example in the RFC, and against peers that break the protocol."""

from __future__ import annotations

from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunneld.errors import NotAllowedError, RemoteProtocolError, UsageError
from tunneld.wire import scram
from tunneld.wire.lines import ControlRequest, format_request, parse_request
from tunneld.wire.scram import FAILED, Challenge, Hello, Proof, ScramClient
from tunneld.wire.verifier import (
    MAX_ITERATIONS,
    MIN_ITERATIONS,
    Verifier,
    check_secret,
    client_and_server_key,
    derive,
    matches,
    sign,
)

# RFC 7677 §3
SALT = b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
SERVER_FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
CLIENT_FINAL = (
    b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="

LOGIN = ScramClient("user", "pencil", "rOprNGfwEbeRWgbNEkqO")
VERIFIER = derive("pencil", SALT, 4096)
NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"


def challenge(verifier: Verifier = VERIFIER, nonce: str = NONCE) -> Challenge:
    return Challenge(Hello.parse(CLIENT_FIRST), verifier, nonce)


# Both ends together


def test_our_client_sends_the_rfcs_example() -> None:
    assert LOGIN.message == CLIENT_FIRST
    assert LOGIN.prove(SERVER_FIRST) == Proof(CLIENT_FINAL, SERVER_FINAL)
    LOGIN.prove(SERVER_FIRST).check(SERVER_FINAL)


def test_our_server_sends_the_rfcs_example() -> None:
    assert challenge().message == SERVER_FIRST
    assert challenge().accept(CLIENT_FINAL) == SERVER_FINAL


@given(
    name=st.text(min_size=1, max_size=20).filter(lambda name: name.encode("utf-8", "ignore").decode() == name),
    secret=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20),
    salt=st.binary(min_size=1, max_size=20),
)
@example(name="a,b=c=2C", secret="", salt=b"s")
def test_client_and_server_agree_on_any_name_and_secret(name: str, secret: str, salt: bytes) -> None:
    login = ScramClient(name, secret, "abc")
    server = Challenge(Hello.parse(login.message), derive(secret, salt, MIN_ITERATIONS), "def")
    assert server.hello.name == name
    proof = login.prove(server.message)
    proof.check(server.accept(proof.message))


# The server


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(CLIENT_FINAL.replace(b"p=dH", b"p=eH"), id="proof"),
        pytest.param(CLIENT_FINAL.replace(b"dVQ=", b"dVQAAAA="), id="long proof"),
        pytest.param(CLIENT_FINAL.rpartition(b"p=")[0] + b"p=", id="no proof"),
        pytest.param(CLIENT_FINAL.replace(b"NlF$k0", b"NlF$k1"), id="nonce"),
        pytest.param(CLIENT_FINAL.replace(b"c=biws", b"c=eSws"), id="channel binding"),
        pytest.param(ScramClient("user", "pencils", LOGIN.nonce).prove(SERVER_FIRST).message, id="secret"),
    ],
)
def test_only_the_right_proof_is_accepted(wrong: bytes) -> None:
    with pytest.raises(NotAllowedError, match=f"^{FAILED}$"):
        challenge().accept(wrong)


def test_the_signed_header_must_be_the_one_that_was_sent_first() -> None:
    """A proof over another header: an attacker on the path changed the client's channel binding flag."""
    hello = replace(Hello.parse(CLIENT_FIRST), header="y,,")
    with pytest.raises(NotAllowedError):
        Challenge(hello, VERIFIER, NONCE).accept(CLIENT_FINAL)


def test_a_proof_is_not_valid_for_another_nonce() -> None:
    with pytest.raises(NotAllowedError):
        challenge(nonce="another").accept(CLIENT_FINAL)


def test_a_valid_proof_that_names_an_old_nonce_is_refused() -> None:
    """Signed with the right key over this challenge, but with the nonce of another."""
    fresh = challenge(nonce="another")
    without_proof = CLIENT_FINAL.rpartition(b",p=")[0]
    client_key, _ = client_and_server_key("pencil", SALT, 4096)
    signature = sign(VERIFIER.stored_key, b",".join([CLIENT_FIRST[3:], fresh.message, without_proof]))
    proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
    with pytest.raises(NotAllowedError):
        fresh.accept(without_proof + b",p=" + b64encode(proof))
    assert Challenge(fresh.hello, VERIFIER, NONCE).accept(CLIENT_FINAL)


@given(st.binary(max_size=200))
@example(b"n,,n=user,r=")
@example(b"p=tls-exporter,,n=user,r=x")
@example(b"n,a=root,n=user,r=x")
@example(b"n,,m=what,n=user,r=x")
@example(b"n,,n=user,r=x,r=y")
@example(b"n,,n==41,r=x")
def test_any_first_message_is_parsed_or_a_usage_error(message: bytes) -> None:
    with suppress(UsageError):
        Hello.parse(message)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda p: CLIENT_FINAL[:70] + p)))
@example(b"c=biws,r=x")
@example(b"c=biws,r=x,p=!")
@example("c=biws,r=ä,p=ä".encode())
def test_any_final_message_is_refused(message: bytes) -> None:
    with pytest.raises((UsageError, NotAllowedError)):
        challenge().accept(message)


# The client


@pytest.mark.parametrize(
    "final", [b"", b"v=", SERVER_FINAL.replace(b"6rri", b"7rri"), b"e=other-error", SERVER_FINAL[2:]]
)
def test_a_server_that_cannot_sign_does_not_know_the_secret(final: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="does not know the secret"):
        LOGIN.prove(SERVER_FIRST).check(final)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (b"r=rOpr", b"r=xOpr", "another nonce"),
        (NONCE.encode(), b"", "another nonce"),
        (b"i=4096", b"i=4095", "4095 iterations"),
        (b"i=4096", b"i=1", "1 iterations"),
        (b"i=4096", f"i={MAX_ITERATIONS + 1}".encode(), "iterations"),
        (b"i=4096", b"i=" + b"9" * 5000, "iterations"),
        (b"i=4096", b"i=4096x", "iterations"),
        (b"s=W22", b"s=!", "salt is not in base64"),
        (b",i=4096", b"", "attributes"),
        (b"r=", b"m=new,r=", "attributes"),
    ],
)
def test_a_malformed_challenge_is_refused(before: bytes, after: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        LOGIN.prove(SERVER_FIRST.replace(before, after))


@given(st.binary(max_size=200))
def test_any_challenge_is_answered_or_a_protocol_error(message: bytes) -> None:
    with suppress(RemoteProtocolError):
        LOGIN.prove(message)


def test_a_secret_that_is_not_ascii_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="printable ASCII") as caught:
        ScramClient("user", "päncil", LOGIN.nonce).prove(SERVER_FIRST)
    assert "päncil" not in str(caught.value)


# Verifiers


@given(
    st.integers(MIN_ITERATIONS, MAX_ITERATIONS), st.binary(min_size=1), st.binary(min_size=32, max_size=32), st.binary()
)
def test_a_verifier_round_trips(iterations: int, salt: bytes, stored: bytes, server: bytes) -> None:
    verifier = Verifier(iterations, salt, stored, server.ljust(32, b"x")[:32])
    assert Verifier.parse(verifier.reveal()) == verifier


def test_a_verifier_of_postgresql_is_accepted() -> None:
    """As PostgreSQL stores it for the RFC's user."""
    text = (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:"
        "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    assert Verifier.parse(text) == VERIFIER
    assert matches(Verifier.parse(text), "pencil")


@pytest.mark.parametrize("secret", ["pencils", "", "pencil ", "päncil", "Pencil"])
def test_another_secret_does_not_match(secret: str) -> None:
    assert not matches(VERIFIER, secret)


@given(st.text())
@example(VERIFIER.reveal().replace("4096", "4095"))
@example(VERIFIER.reveal().replace("4096", f"{MAX_ITERATIONS + 1}"))
@example(VERIFIER.reveal().replace(":W22", ":!W22"))
@example(VERIFIER.reveal()[:-8])
@example(VERIFIER.reveal() + "\n")
def test_an_invalid_verifier_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Verifier.parse(text)
    assert len(text) < 12 or text not in str(caught.value)


def test_secrets_are_not_printed() -> None:
    shown = f"{VERIFIER} {VERIFIER!r} {LOGIN} {LOGIN!r} {LOGIN.prove(SERVER_FIRST)!r} {challenge()!r}"
    parts = [SALT, VERIFIER.stored_key, VERIFIER.server_key]
    for secret in ["pencil", *(b64encode(part).decode() for part in parts), *map(repr, parts)]:
        assert secret not in shown


@pytest.mark.parametrize(("secret", "valid"), [("x" * 8, True), ("x" * 7, False), ("", False), ("x" * 8 + "\n", False)])
def test_a_secret_has_a_minimal_length_and_no_line_end(secret: str, valid: bool) -> None:
    if valid:
        check_secret(secret)
    else:
        with pytest.raises(UsageError, match="a secret"):
            check_secret(secret)


# Encoding in the control protocol


@given(st.binary(min_size=1, max_size=300))
@example(b64decode("abcdaa=="))
def test_a_message_is_one_argument_of_a_request(message: bytes) -> None:
    """With padding, a word of lower-case letters would be parsed as `key=value`."""
    request = parse_request(format_request(ControlRequest("auth", (scram.encode(message, padded=False),))))
    assert request.options == {}
    assert scram.decode(request.args[0]) == message == scram.decode(scram.encode(message))


@given(st.text(max_size=50))
@example("a")
@example("=====")
@example("ä")
def test_any_word_is_decoded_or_a_usage_error(word: str) -> None:
    with suppress(UsageError):
        scram.decode(word)
