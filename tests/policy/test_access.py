"""Who may do what: decisions about facts, each at its edge."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tunneld.errors import LimitReachedError, NotAllowedError
from tunneld.net.endpoint import parse_network
from tunneld.policy.access import EVERYBODY, Grant, Role, check_role, permit
from tunneld.policy.options import TunnelOptions

ALICE = Grant("alice")
ADMIN = Grant("root", Role.ADMIN)
HOME = (parse_network("192.0.2.0/24"), parse_network("2001:db8::/32"))


def opening(
    grant: Grant,
    words: Mapping[str, str] | None = None,
    *,
    backend: str = "tcp",
    asker: str = "192.0.2.7",
    opened: int = 0,
) -> TunnelOptions:
    """What becomes of the options of a request."""
    return permit(grant, backend, TunnelOptions.parse(words or {}), asker, opened)


@pytest.mark.parametrize(
    ("grant", "needed", "may"),
    [
        (None, None, True),
        (None, Role.USER, False),
        (None, Role.ADMIN, False),
        (ALICE, None, True),
        (ALICE, Role.USER, True),
        (ALICE, Role.ADMIN, False),
        (ADMIN, None, True),
        (ADMIN, Role.USER, True),
        (ADMIN, Role.ADMIN, True),
        (EVERYBODY, Role.ADMIN, True),
    ],
)
def test_roles(grant: Grant | None, needed: Role | None, may: bool) -> None:
    if may:
        check_role(grant, needed, "status")
    else:
        with pytest.raises(NotAllowedError, match=r"^status is (not for strangers|for admins, and credential 'alice')"):
            check_role(grant, needed, "status")


def test_a_grant_without_bounds_changes_nothing() -> None:
    words = {"ttl": "100", "server_from": "any", "client_port": "1"}
    assert opening(ALICE, words, opened=10**6) == TunnelOptions.parse(words)


@pytest.mark.parametrize(("backend", "allowed"), [("tcp", True), ("webmux", True), ("ssh", False), ("", False)])
def test_backends(backend: str, allowed: bool) -> None:
    grant = Grant("alice", backends=("tcp", "webmux"))
    if allowed:
        opening(grant, backend=backend)
    else:
        with pytest.raises(NotAllowedError, match="credential 'alice' may open tunnels of tcp, webmux, not of"):
            opening(grant, backend=backend)


@pytest.mark.parametrize(
    ("port", "allowed"), [("79", False), ("80", True), ("81", False), ("1999", False), ("2000", True), ("2009", True)]
)
def test_ports_at_both_ends_of_a_range(port: str, allowed: bool) -> None:
    grant = Grant("alice", ports=(range(80, 81), range(2000, 2010)))
    if allowed:
        assert opening(grant, {"client_port": port}).client_port == int(port)
    else:
        with pytest.raises(NotAllowedError, match=f"may not ask for client_port={port}, only for 80, 2000-2009"):
            opening(grant, {"client_port": port})


def test_a_tunnel_that_asks_for_no_port_needs_none() -> None:
    assert opening(Grant("alice", ports=(range(80, 81),))).client_port is None


@pytest.mark.parametrize(
    ("asker", "server_from", "allowed"),
    [
        ("192.0.2.7", "", True),
        ("192.0.3.7", "", False),
        ("2001:db8::1", "", True),
        ("2001:db9::1", "", False),
        ("", "", False),  # a Unix socket
        ("192.0.2.7", "192.0.2.0/24", True),
        ("192.0.2.7", "192.0.2.0/25", True),
        ("192.0.2.7", "192.0.2.0/23", False),
        ("192.0.3.7", "192.0.2.1", True),
        ("192.0.2.7", "any", False),
        ("192.0.2.7", "::/0", False),
        ("192.0.2.7", "0.0.0.0/0", False),
    ],
)
def test_hidden_servers_stay_below_the_ceiling(asker: str, server_from: str, allowed: bool) -> None:
    words = {"server_from": server_from} if server_from else {}
    grant = Grant("alice", server_from=HOME)
    if allowed:
        opening(grant, words, asker=asker)
    else:
        with pytest.raises(NotAllowedError, match=r"hidden servers .* may come from 192\.0\.2\.0/24, 2001:db8::/32"):
            opening(grant, words, asker=asker)


@pytest.mark.parametrize(("asked", "given"), [(None, 60.0), ("59", 59.0), ("60", 60.0), ("61", 60.0)])
def test_ttl_is_default_and_cap(asked: str | None, given: float) -> None:
    words = {} if asked is None else {"ttl": asked}
    assert opening(Grant("alice", max_ttl=60.0), words).ttl == given


def test_the_last_tunnel_is_allowed_and_the_next_is_not() -> None:
    grant = Grant("alice", max_tunnels=3)
    opening(grant, opened=2)
    with pytest.raises(LimitReachedError, match=r"3 of credential 'alice' are open \(its max_tunnels\)"):
        opening(grant, opened=3)


@pytest.mark.parametrize(
    ("host", "admitted"),
    [
        ("192.0.2.0", True),
        ("192.0.2.255", True),
        ("192.0.3.0", False),
        ("2001:db8:ffff::", True),
        ("::ffff:192.0.2.1", True),
        ("fe80::1%eth0", False),
        ("unix", False),
        ("", False),
    ],
)
def test_where_it_may_be_used_from(host: str, admitted: bool) -> None:
    assert Grant("alice", networks=HOME).admits(host) == admitted
    assert Grant("alice").admits(host)
