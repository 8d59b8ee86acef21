"""Private tunnels: claims of a node's id, and which credentials may ask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import NotAllowedError, UsageError
from tunneld.net.address import Private
from tunneld.net.node_id import NodeId
from tunneld.policy.access import Grant
from tunneld.policy.options import TunnelOptions
from tunneld.policy.private import PrivateClaim, check_private_options, check_visit, claimed_text, parse_peer
from tunneld.tls.identity import Identity, is_signed_by

ALICE = Identity.from_seed(bytes(range(32)))
CLAIM = (
    "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg."
    "qjFJHolLeJ4wV9_nFXVzG4rNx5UG3xOlVy_4JehJZnv7KYZJNE0pdrZeRdSgLVYIW4p0569Sy4n3hXMpMa3AAQ"
)
"""As tunneld-control(7) has it."""
SHELL = Private(NodeId(bytes(range(20))), "shell")


def test_the_claim_in_the_manual() -> None:
    claim = PrivateClaim.parse(CLAIM)
    assert str(PrivateClaim(ALICE.public_key(), ALICE.sign(claimed_text("alice", "shell")))) == CLAIM
    assert claim.node == ALICE.id == NodeId.parse("oFCDfYUHBYLM9zlLCYiEfMMSy4g")
    assert is_signed_by(claim.public_key, claimed_text("alice", "shell"), claim.signature)
    for other in (claimed_text("bob", "shell"), claimed_text("alice", "web"), claimed_text("", "shell")):
        assert not is_signed_by(claim.public_key, other, claim.signature)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=64, max_size=64))
def test_a_claim_is_what_its_text_says(key: bytes, signature: bytes) -> None:
    claim = PrivateClaim(key, signature)
    assert PrivateClaim.parse(str(claim)) == claim
    assert TunnelOptions.parse({"private": str(claim)}).words() == {"private": str(claim)}


@pytest.mark.parametrize(
    "text", ["", ".", CLAIM[:-1], CLAIM + "A", CLAIM.replace(".", ""), CLAIM.replace("A6EHv", "A6E+v"), f"{CLAIM}."]
)
def test_other_texts_are_no_claims(text: str) -> None:
    with pytest.raises(UsageError, match=r"option private="):
        TunnelOptions.parse({"private": text})
    with pytest.raises(ValueError, match=r"not"):
        PrivateClaim.parse(text)


@pytest.mark.parametrize(
    "words",
    [
        {"persist": "yes"},
        {"name": "shell"},
        {"name": "shell", "persist": "yes", "host": "blog"},
        {"name": "shell", "persist": "yes", "client_port": "8011"},
        {"name": "shell", "persist": "yes", "auth": "link"},
    ],
)
def test_options_that_a_private_tunnel_cannot_have(words: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        check_private_options(TunnelOptions.parse({"private": CLAIM, **words}))
    check_private_options(TunnelOptions.parse({"private": CLAIM, "name": "shell", "persist": "yes", "ttl": "60"}))


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        (None, True),
        ((), False),
        (("*@*",), True),
        (("shell@*",), True),
        (("web@*", "sh*@*"), True),
        ((f"*@{SHELL.node}",), True),
        (("web@*",), False),
        ((f"web@{SHELL.node}", "shell@BAECAwQFBgcICQoLDA0ODxAREhM"), False),
        (("SHELL@*",), False),
    ],
)
def test_which_tunnels_a_credential_may_ask_for(patterns: tuple[str, ...] | None, allowed: bool) -> None:
    grant = Grant("bob", visit=patterns)
    if allowed:
        check_visit(grant, SHELL)
    else:
        with pytest.raises(NotAllowedError, match=r"credential 'bob' may not visit shell@.*operator"):
            check_visit(grant, SHELL)


def test_the_form_of_a_peer() -> None:
    for text in ("bob", str(SHELL.node), "-" + str(SHELL.node)[1:], "_" + str(SHELL.node)[1:]):
        assert parse_peer(text) == text
    for text in ("a b", "", "bob@home", "x" * 65):
        with pytest.raises(ValueError, match="not the name or the id"):
            parse_peer(text)
