"""What a grant permits, each decision at its edge."""

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


def permitted(
    grant: Grant,
    words: Mapping[str, str] | None = None,
    *,
    backend: str = "tcp",
    host: str = "192.0.2.7",
    opened: int = 0,
) -> TunnelOptions:
    """The options of a request after the check."""
    return permit(grant, backend, TunnelOptions.parse(words or {}), host, opened)


VIEWER = Grant("eye", Role.VIEWER)


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
        (VIEWER, None, True),
        (VIEWER, Role.USER, True),
        (VIEWER, Role.ADMIN, True),
    ],
)
def test_roles(grant: Grant | None, needed: Role | None, may: bool) -> None:
    if may:
        check_role(grant, needed, "status", changes=False)
    else:
        with pytest.raises(
            NotAllowedError, match=r"^status requires (authentication|the role admin: credential 'alice')"
        ):
            check_role(grant, needed, "status", changes=False)


@pytest.mark.parametrize("needed", [Role.USER, Role.ADMIN])
def test_a_viewer_changes_nothing(needed: Role) -> None:
    with pytest.raises(NotAllowedError, match=r"^close is not allowed: credential 'eye' has the role viewer"):
        check_role(VIEWER, needed, "close", changes=True)
    with pytest.raises(NotAllowedError, match="opens no tunnels"):
        permitted(VIEWER, {})
    assert VIEWER.may_see("alice")


def test_a_grant_without_bounds_changes_nothing() -> None:
    words = {"ttl": "100", "server_from": "any", "client_port": "1"}
    assert permitted(ALICE, words, opened=10**6) == TunnelOptions.parse(words)


@pytest.mark.parametrize(("backend", "allowed"), [("tcp", True), ("webmux", True), ("ssh", False), ("", False)])
def test_backends(backend: str, allowed: bool) -> None:
    grant = Grant("alice", backends=("tcp", "webmux"))
    if allowed:
        permitted(grant, backend=backend)
    else:
        with pytest.raises(
            NotAllowedError, match=r"^credential 'alice' may not use the backend '.*', only tcp, webmux$"
        ):
            permitted(grant, backend=backend)


@pytest.mark.parametrize(
    ("port", "allowed"), [("79", False), ("80", True), ("81", False), ("1999", False), ("2000", True), ("2009", True)]
)
def test_ports_at_both_ends_of_a_range(port: str, allowed: bool) -> None:
    grant = Grant("alice", ports=(range(80, 81), range(2000, 2010)))
    if allowed:
        assert permitted(grant, {"client_port": port}).client_port == int(port)
    else:
        with pytest.raises(NotAllowedError, match=f"may not use public port {port}, only 80, 2000-2009"):
            permitted(grant, {"client_port": port})


def test_a_request_without_a_port_is_permitted() -> None:
    assert permitted(Grant("alice", ports=(range(80, 81),))).client_port is None


@pytest.mark.parametrize(
    ("host", "server_from", "allowed"),
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
def test_server_connections_stay_inside_the_networks_of_the_grant(host: str, server_from: str, allowed: bool) -> None:
    words = {"server_from": server_from} if server_from else {}
    grant = Grant("alice", server_from=HOME)
    if allowed:
        permitted(grant, words, host=host)
    else:
        with pytest.raises(NotAllowedError, match=r"only for servers at 192\.0\.2\.0/24, 2001:db8::/32, not at"):
            permitted(grant, words, host=host)


def test_the_last_tunnel_is_allowed_and_the_next_is_not() -> None:
    grant = Grant("alice", max_tunnels=3)
    permitted(grant, opened=2)
    with pytest.raises(
        LimitReachedError, match=r"^tunnel limit reached: credential 'alice' has 3 of 3 open \(max_tunnels\)$"
    ):
        permitted(grant, opened=3)


@pytest.mark.parametrize(
    ("host", "admitted"),
    [
        ("192.0.2.0", True),
        ("192.0.2.255", True),
        ("192.0.3.0", False),
        ("2001:db8:ffff::", True),
        ("fe80::1%eth0", False),
        ("unix", False),
        ("", False),
    ],
)
def test_networks_that_a_credential_may_be_used_from(host: str, admitted: bool) -> None:
    assert Grant("alice", networks=HOME).admits(host) == admitted
    assert Grant("alice").admits(host)
