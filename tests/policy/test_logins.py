"""The option `auth`: logins with verifiers."""

from __future__ import annotations

import pytest

from tunneld.errors import UsageError
from tunneld.policy.logins import LINK, MAX_AUTH_ITERATIONS, MAX_LOGINS, Login, derive_auth, parse_auth
from tunneld.policy.options import TunnelOptions, format_option
from tunneld.wire.lines import MAX_LINE
from tunneld.wire.verifier import Verifier, derive, matches


def test_what_the_agent_derives_the_relay_reads() -> None:
    text = derive_auth(["alice:correct horse", LINK, "bob:battery:staple"], "blog", b"")
    alice, link, bob = parse_auth(text)
    assert link == LINK
    assert isinstance(alice, Login)
    assert isinstance(bob, Login)
    assert (alice.user, bob.user) == ("alice", "bob")
    assert matches(alice.verifier, "correct horse")
    assert matches(bob.verifier, "battery:staple")
    assert not matches(alice.verifier, "battery:staple")


def test_a_request_and_a_handover_have_the_verifiers_and_messages_do_not() -> None:
    text = derive_auth(["alice:correct horse"], "blog", b"")
    options = TunnelOptions.parse({"auth": text})
    assert options.words() == {"auth": text}
    assert TunnelOptions.parse(options.words()) == options
    assert format_option(options.auth) == "alice:..."
    assert text.partition("$")[2] not in repr(options)


def test_agents_of_one_tunnel_derive_the_same_and_other_tunnels_another_one() -> None:
    same = [derive_auth(["alice:correct horse"], "blog", salt) for salt in (b"1", b"2")]
    assert same[0] == same[1]
    assert derive_auth(["alice:correct horse"], "shop", b"1") != same[0]
    assert derive_auth(["alice:correct horse"], "", b"1") != derive_auth(["alice:correct horse"], "", b"2")


@pytest.mark.parametrize("text", ["alice", "alice:short", ":long enough", "a,b:long enough", "a b:long enough"])
def test_a_login_that_cannot_be_used_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        derive_auth([text], "blog", b"")
    assert "long enough" not in str(caught.value)
    assert "short" not in str(caught.value)


def verifier(iterations: int = 4096) -> str:
    return Verifier(iterations, bytes(16), bytes(32), bytes(32)).reveal()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "alice",
        "alice:secret",
        "link,link",
        f"alice:{verifier()},alice:{verifier()}",
        f"alice:{verifier(MAX_AUTH_ITERATIONS + 1)}",
        ",".join(f"u{number}:{verifier()}" for number in range(MAX_LOGINS + 1)),
    ],
)
def test_what_is_no_list_of_logins_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not|more|twice"):
        parse_auth(text)


def test_the_most_logins_fit_a_request() -> None:
    text = ",".join(f"{'u' * 20}{number}:{derive('x', bytes(16), 4096).reveal()}" for number in range(MAX_LOGINS))
    assert len(parse_auth(text)) == MAX_LOGINS
    assert len(f"openTunnel webmux auth={text}") < MAX_LINE
    assert len(parse_auth(f"alice:{verifier(MAX_AUTH_ITERATIONS)}")) == 1


def test_the_message_about_a_wrong_value_has_no_verifier() -> None:
    with pytest.raises(UsageError) as caught:
        TunnelOptions.parse({"auth": f"alice:{verifier()},alice:{verifier()}"})
    assert "SCRAM" not in str(caught.value)
    assert "option auth=...: a user name is given twice" in str(caught.value)
