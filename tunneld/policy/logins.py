"""Which visitors of a host name may see it: the value of the option `auth`. Pure.

    auth=USER:VERIFIER[,USER:VERIFIER...]     a user name and a password (HTTP Basic)
    auth=link                                 a link that the owner has shared, see `sites.links`

The relay gets verifiers of the passwords (`wire.verifier`), never the passwords. The agent derives them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tunneld.errors import UsageError
from tunneld.wire.verifier import Verifier, check_secret, derive

LINK = "link"
"""In place of a login: only visitors with a shared link get in."""

MAX_LOGINS = 20
"""Logins of one tunnel: what fits a line of the control protocol (`MAX_LINE`), at about 160 bytes each."""

MAX_AUTH_ITERATIONS = 600_000
"""Of a verifier: the work of one check is the relay's, about half a second of a processor."""

SALT_BYTES = 16

_USER = re.compile(r"[\x21-\x2b\x2d-\x39\x3b-\x7e]{1,64}")


@dataclass(frozen=True, slots=True)
class Login:
    """A user name, and the verifier of its password. It does not print the verifier."""

    user: str
    verifier: Verifier

    @classmethod
    def parse(cls, text: str) -> Login:
        """Read `USER:VERIFIER`. Raises `ValueError`, which does not quote the verifier."""
        user, _, verifier = text.partition(":")
        if not _USER.fullmatch(user):
            raise ValueError("not USER:VERIFIER, with a user name of at most 64 letters, digits and signs")
        try:
            parsed = Verifier.parse(verifier)
        except UsageError as error:
            raise ValueError(f"the verifier of {user!r} is {error}") from None
        if parsed.iterations > MAX_AUTH_ITERATIONS:
            raise ValueError(f"the verifier of {user!r} has more than {MAX_AUTH_ITERATIONS} iterations")
        return cls(user, parsed)

    def reveal(self) -> str:
        """The text that `parse` accepts."""
        return f"{self.user}:{self.verifier.reveal()}"

    def __str__(self) -> str:
        return f"{self.user}:..."


def parse_auth(text: str) -> tuple[Login | str, ...]:
    """Read the value of `auth`. Raises `ValueError`."""
    words = text.split(",")
    if len(words) > MAX_LOGINS:
        raise ValueError(f"more than {MAX_LOGINS} logins")
    logins = tuple(LINK if word == LINK else Login.parse(word) for word in words)
    users = [login.user for login in logins if isinstance(login, Login)]
    if len(set(users)) < len(users) or logins.count(LINK) > 1:
        raise ValueError("a user name is given twice")
    return logins


def derive_auth(passwords: Sequence[str], tunnel: str, random_salt: bytes) -> str:
    """The value of `auth` for `USER:PASSWORD` texts. Slow by design. Raises `UsageError`, which quotes no password.

    The salt is that of the user of the tunnel with this name, so agents that share a tunnel have the same verifiers;
    without a name it is `random_salt`.
    """
    return ",".join(word if word == LINK else _derived(word, tunnel, random_salt) for word in passwords)


def _derived(text: str, tunnel: str, random_salt: bytes) -> str:
    user, colon, password = text.partition(":")
    if not colon or not _USER.fullmatch(user):
        raise UsageError("a login is USER:PASSWORD, with a user name of at most 64 letters, digits and signs, or link")
    try:
        check_secret(password)
    except UsageError as error:
        raise UsageError(f"the password of {user!r} is not acceptable: {error}") from None
    salt = hashlib.sha256(f"auth\0{tunnel}\0{user}".encode()).digest()[:SALT_BYTES] if tunnel else random_salt
    return Login(user, derive(password, salt)).reveal()
