"""Links that let visitors into a protected site until they expire: `tunnel share`.

    https://blog.t.example.org/?tunneld-share=TOKEN   ──► 303 to the same address without the token, and a cookie
    Cookie: tunneld-share=TOKEN                       ──► the request passes, until the token expires

A token is signed with a key in the state folder, for one name and one credential: the next owner of a name does not
inherit the links of the former one. The relay keeps no list of links. To revoke, it notes the time, per name: links
issued before that are void. A note is dropped once such links have expired anyway.
"""

from __future__ import annotations

import binascii
import hmac
import json
import os
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunneld.errors import LimitReachedError, UsageError
from tunneld.net.address import HostName
from tunneld.policy.units import count
from tunneld.tls.private_files import sync_folder, temporary_beside, write_private

PARAMETER = b"tunneld-share"
"""Of the query, and the name of the cookie."""

MAX_COOKIES = 4
"""Cookies of that name that are looked at: another site of the same domain can set some, too."""

MAX_REVOCATIONS = 10_000
"""Names with revoked links that are remembered, at about 200 bytes each."""

MAX_SHARE = 30 * 24 * 3600.0
"""Seconds: a shared link is a password that is never changed."""

FILE = "share_links.json"
"""The name of the file in the state folder."""

_KEY_BYTES = 32
_TIME_BYTES = 6  # milliseconds until the year 10889
_NONCE_BYTES = 8
_MAC_BYTES = 16
_TOKEN_BYTES = 2 * _TIME_BYTES + _NONCE_BYTES + _MAC_BYTES


@dataclass(frozen=True, slots=True)
class LinkScope:
    """What a link opens: the site with a name, as long as a tunnel of this credential has it."""

    credential: str
    name: HostName

    @property
    def key(self) -> str:
        """As it is signed and stored."""
        return f"{self.credential}\0{self.name}"


class ShareLinks:
    """Issues, checks and revokes links. Times are seconds of the real clock."""

    def __init__(self, max_seconds: Callable[[], float] = lambda: MAX_SHARE, folder: Path | None = None) -> None:
        """`max_seconds` is the longest life of a link. `folder` has the state; None: links end with the process."""
        self._max_seconds = max_seconds
        self._folder = folder
        self._key = b""
        self._revoked: dict[str, int] = {}  # by scope: the time in milliseconds, oldest first
        self._is_loaded = False

    def issue(self, scope: LinkScope, now: float, seconds: float) -> str:
        """A new token. Raises `UsageError`, or OSError where the key cannot be stored."""
        if seconds > (limit := self._max_seconds()):
            raise UsageError(f"a link lasts at most {limit:g} s on this relay (names.max_share)")
        self._load()
        if not self._key:
            self._key = secrets.token_bytes(_KEY_BYTES)
            self._save()
        body = _time(now) + _time(now + seconds) + secrets.token_bytes(_NONCE_BYTES)
        return urlsafe_b64encode(body + self._sign(scope, body)).decode()

    def expiry(self, token: bytes, scope: LinkScope, now: float) -> float | None:
        """When a token expires; None: it is not valid for `scope`, or any more."""
        self._load()
        try:
            data = urlsafe_b64decode(token) if self._key and len(token) < 2 * _TOKEN_BYTES else b""
        except binascii.Error:
            return None
        body, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
        if len(data) != _TOKEN_BYTES or not hmac.compare_digest(self._sign(scope, body), mac):
            return None
        issued, expires = (int.from_bytes(body[at : at + _TIME_BYTES], "big") for at in (0, _TIME_BYTES))
        if expires <= now * 1000 or issued <= self._revoked.get(scope.key, -1):
            return None
        return expires / 1000

    def revoke(self, scope: LinkScope, now: float) -> None:
        """Make all links void that were issued so far. Raises `LimitReachedError`, or OSError where the file cannot be
        written; they are void until a restart then.
        """
        self._load()
        oldest = int((now - self._max_seconds()) * 1000)
        self._revoked = {key: at for key, at in self._revoked.items() if at > oldest and key != scope.key}
        if len(self._revoked) >= MAX_REVOCATIONS:
            names = count(MAX_REVOCATIONS, "name")
            raise LimitReachedError(f"links of {names} are revoked already; try again when they have expired")
        self._revoked[scope.key] = int(now * 1000)
        self._save()

    def _sign(self, scope: LinkScope, body: bytes) -> bytes:
        return hmac.digest(self._key, body + scope.key.encode(), "sha256")[:_MAC_BYTES]

    def _load(self) -> None:
        """Read the file once, when a link is first issued or presented. An unreadable file is like none: all links are
        void then.
        """
        if self._is_loaded:
            return
        self._is_loaded = True
        if self._folder is None:
            return
        try:
            stored = json.loads((self._folder / FILE).read_bytes())
            self._key = bytes.fromhex(stored["key"])
            self._revoked = {str(key): int(at) for key, at in stored["revoked"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._key, self._revoked = b"", {}

    def _save(self) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / FILE
        temporary = temporary_beside(path)
        temporary.unlink(missing_ok=True)
        write_private(temporary, json.dumps({"key": self._key.hex(), "revoked": self._revoked}).encode())
        os.replace(temporary, path)  # noqa: PTH105
        sync_folder(self._folder)


def token_in(target: bytes) -> tuple[bytes, bytes] | None:
    """The token in the query of a target, and the target without it; None where there is none."""
    path, question, query = target.partition(b"?")
    if PARAMETER + b"=" not in query:
        return None
    parts = query.split(b"&")
    token = next((part[len(PARAMETER) + 1 :] for part in parts if part.startswith(PARAMETER + b"=")), None)
    if token is None:
        return None
    rest = b"&".join(part for part in parts if not part.startswith(PARAMETER + b"="))
    return token, path + (question + rest if rest else b"")


def cookies_in(value: bytes) -> tuple[list[bytes], bytes]:
    """The tokens in a Cookie field, and the field without them."""
    parts = [part.strip() for part in value.split(b";")]
    tokens = [part[len(PARAMETER) + 1 :] for part in parts if part.startswith(PARAMETER + b"=")]
    rest = b"; ".join(part for part in parts if part and not part.startswith(PARAMETER + b"="))
    return tokens[:MAX_COOKIES], rest


def cookie(token: bytes, seconds: float, path: str, *, is_secure: bool) -> bytes:
    """The value of Set-Cookie."""
    secure = b"; Secure" if is_secure else b""
    attributes = b"; Max-Age=%d; Path=%b; HttpOnly; SameSite=Lax" % (max(1, int(seconds)), path.encode() or b"/")
    return PARAMETER + b"=" + token + attributes + secure


def _time(seconds: float) -> bytes:
    return int(seconds * 1000).to_bytes(_TIME_BYTES, "big")
