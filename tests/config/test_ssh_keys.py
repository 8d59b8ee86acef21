"""`authorized_keys` of a credential: lines as sshd has them, and no surprise in them."""

from __future__ import annotations

import asyncssh
import pytest

from tunneld.config.ssh_keys import check_line, may_forward, split

KEY = asyncssh.generate_private_key("ssh-ed25519", comment="me at home").export_public_key().decode().strip()
RIGHT = [
    KEY,
    f"restrict,port-forwarding {KEY}",
    f'from="192.0.2.0/24,2001:db8::/32",no-pty {KEY}',
    f"cert-authority {KEY}",
]


@pytest.mark.parametrize("line", RIGHT)
def test_a_line_of_authorized_keys_is_taken(line: str) -> None:
    check_line(line)
    assert split(line)[1] == KEY


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "give each key as a string of its own"),
        (f"{KEY}\n{KEY}", "give each key as a string of its own"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "ends in .pub"),
        ("alice", "is not a line of authorized_keys"),
        ("ssh-ed25519 AAAA", "is not a line of authorized_keys"),
        (f'command="/bin/true" {KEY}', "the option command of .* is not known"),
        (f'expiry-time="20300101" {KEY}', "the option expiry-time of"),
        (f'from="192.0.2.1 {KEY}', "is not a line of authorized_keys"),
    ],
)
def test_a_mistake_is_told(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_line(line)


@pytest.mark.parametrize(
    ("options", "may"),
    [([], True), (["restrict"], False), (["no-port-forwarding"], False), (["restrict", "Port-Forwarding"], True)],
)
def test_restrict_forbids_forwarding_unless_it_is_allowed_again(options: list[str], may: bool) -> None:
    assert may_forward(options) is may
