"""The sessions of the web page: who is logged in, in which browser, until when. Kept in memory only.

Both halves of a session are random; only their digests are kept, so that looking one up takes the same time for every
wrong one.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tunneld.config.credentials import Credential
from tunneld.config.http import PageSettings

TOKEN_BYTES = 32
"""Random bytes of each half of a session: 256 bits cannot be guessed."""


@dataclass(slots=True)
class PageSession:
    """One login. Times are those of the clock of `PageSessions`."""

    credential: Credential
    token: bytes  # its digest
    began: float
    used: float  # when the page last asked for anything, or had a stream


class PageSessions:
    """All sessions, the least recently used first."""

    def __init__(self, settings: Callable[[], PageSettings], clock: Callable[[], float]) -> None:
        """`settings` is called at each use, so that a reload applies to sessions that exist."""
        self._settings = settings
        self._clock = clock
        self._sessions: OrderedDict[bytes, PageSession] = OrderedDict()  # by the digest of the cookie

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, credential: Credential) -> tuple[str, str]:
        """Begin a session: its cookie and its token. Where there are too many of the credential, or in all, the least
        recently used one ends.
        """
        self._forget_expired()
        settings = self._settings()
        own = [key for key, session in self._sessions.items() if session.credential.name == credential.name]
        if len(own) >= settings.max_sessions_per_credential:
            del self._sessions[own[0]]
        while len(self._sessions) >= settings.max_sessions:
            self._sessions.popitem(last=False)
        cookie, token = secrets.token_urlsafe(TOKEN_BYTES), secrets.token_urlsafe(TOKEN_BYTES)
        now = self._clock()
        self._sessions[_digest(cookie)] = PageSession(credential, _digest(token), now, now)
        return cookie, token

    def find(self, cookie: str, token: str | None = None) -> PageSession | None:
        """The session with this cookie and token, which is used now; None if there is none, or not any more. Without a
        `token` only the cookie is checked, which is enough for what everybody may read.
        """
        key = _digest(cookie)
        session = self._sessions.get(key)
        if session is None or (token is not None and not secrets.compare_digest(session.token, _digest(token))):
            return None
        if self._has_expired(session):
            del self._sessions[key]
            return None
        if token is not None:
            session.used = self._clock()
            self._sessions.move_to_end(key)
        return session

    def end(self, cookie: str) -> None:
        """End the session with this cookie, if there is one."""
        self._sessions.pop(_digest(cookie), None)

    def _forget_expired(self) -> None:
        for key in [key for key, session in self._expired()]:
            del self._sessions[key]

    def _expired(self) -> Iterator[tuple[bytes, PageSession]]:
        return ((key, session) for key, session in self._sessions.items() if self._has_expired(session))

    def _has_expired(self, session: PageSession) -> bool:
        now, settings = self._clock(), self._settings()
        return now >= min(session.began + settings.session_timeout, session.used + settings.idle_timeout)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()
