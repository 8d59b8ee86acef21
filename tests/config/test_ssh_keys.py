"""`authorized_keys` of a credential: lines as for sshd, and errors for unsupported ones."""

from __future__ import annotations

import asyncssh
import pytest

from tunneld.config.ssh_keys import check_line, may_forward, split

KEY = asyncssh.generate_private_key("ssh-ed25519", comment="me at home").export_public_key().decode().strip()
VALID = [
    KEY,
    f"restrict,port-forwarding {KEY}",
    f'from="192.0.2.0/24,2001:db8::/32",no-pty {KEY}',
    f"cert-authority {KEY}",
]


@pytest.mark.parametrize("line", VALID)
def test_a_valid_line_is_accepted(line: str) -> None:
    check_line(line)
    assert split(line)[1] == KEY


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "write each key as a separate string"),
        (f"{KEY}\n{KEY}", "write each key as a separate string"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "ends in .pub"),
        ("alice", "is not a line of authorized_keys"),
        ("ssh-ed25519 AAAA", "is not a line of authorized_keys"),
        (f'command="/bin/true" {KEY}', "option command of .* is not supported"),
        (f'expiry-time="20300101" {KEY}', "option expiry-time of"),
        (f'from="192.0.2.1 {KEY}', "is not a line of authorized_keys"),
    ],
)
def test_an_invalid_line_is_refused(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_line(line)


@pytest.mark.parametrize(
    ("options", "may"),
    [([], True), (["restrict"], False), (["no-port-forwarding"], False), (["restrict", "Port-Forwarding"], True)],
)
def test_restrict_forbids_forwarding_unless_it_is_allowed_again(options: list[str], may: bool) -> None:
    assert may_forward(options) is may
