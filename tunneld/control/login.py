"""Authentication on one connection of the line protocol: who its peer is, and the verb `auth`.

stranger ──auth SCRAM-SHA-256 FIRST──► challenged ──auth FINAL──► known
    ▲                                      │ no proof
    └──────────────────────────────────────┘         at most MAX_FAILURES times, and until one deadline
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from tunneld.auth.authenticator import Authenticator
from tunneld.config.credentials import Credential
from tunneld.control.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.wire import scram
from tunneld.wire.lines import Request
from tunneld.wire.scram import FAILED, Challenge, Hello
from tunneld.wire.verifier import MECHANISM

AUTH = "auth"

MAX_FAILURES = 3
"""Per connection: enough for a person's slips, and each further guess costs a new connection."""

NONCE_OCTETS = 18
"""Of randomness, 24 characters: never the same twice."""


class LoginState:
    """One peer: `host` and `peer` are its address without and with the port, `local_host` is ours.

    `certificate` is the one that TLS has verified, in DER, if any. `on_known` is called when
    the peer has authenticated.
    """

    def __init__(
        self,
        gate: Authenticator,
        host: str,
        peer: str,
        local_host: str,
        certificate: bytes | None = None,
        on_known: Callable[[], None] = lambda: None,
    ) -> None:
        self.failures = 0
        self._at_end: dict[str, Callable[[], None]] = {}
        self._on_known = on_known
        self._gate = gate
        self._host, self._peer, self._local_host = host, peer, local_host
        self._has_certificate = certificate is not None
        self._credential: Credential | None = gate.admit_certificate(certificate, host) if certificate else None
        self._challenge: Challenge | None = None
        self._said = ""  # who it said last that it is

    @property
    def grant(self) -> Grant | None:
        """What the peer may do now; None while it is a stranger."""
        if self._gate.is_open:
            return EVERYBODY
        return None if self._credential is None else self._gate.renew(self._credential)

    def check_standing(self) -> None:
        """Raise `NotAllowedError` where whoever authenticated here is somebody no more."""
        if self._credential is not None and self.grant is None:
            raise NotAllowedError(
                f"credential {self._credential.name!r} was removed, or has another secret, since you authenticated"
            )

    @property
    def caller(self) -> Requester:
        """The peer as the verbs see it."""
        grant = self.grant
        owner = f"{grant.name}@{self._peer}" if grant and grant.name else self._peer
        return Requester(self._host, owner, self._local_host, grant, lambda: self.grant, self._at_end.__setitem__)

    def end(self) -> None:
        """The connection is over: whoever wanted to know is told."""
        while self._at_end:
            self._at_end.popitem()[1]()

    @property
    def method(self) -> str:
        """What the greeting says behind `auth=`."""
        if self.grant is None:
            return MECHANISM.lower()
        return "certificate" if self._has_certificate else "none"

    def answer(self, request: Request) -> Reply:
        """Take one step of an authentication. Raises `NotAllowedError`, `UsageError`, and `LimitReachedError` where
        other connections from the same source have earned it a penalty; each counts on this connection.
        """
        if self._gate.is_open:
            raise UsageError("this relay asks nobody to authenticate")
        if self.grant is not None:
            raise UsageError("authenticated already; connect again to be somebody else")
        if (penalty := self._gate.penalty(self._host)) > 0:  # or many connections at once would be as many guesses
            self.failures += 1
            raise LimitReachedError(f"too many failures from your address; try again in {penalty:.0f} s")
        try:
            return self._step(request)
        except (NotAllowedError, UsageError) as error:
            self._challenge = None
            self.failures += 1
            self._gate.log_failure(self._host, "control", str(error), self._said)
            raise

    def _step(self, request: Request) -> Reply:
        match request.args:
            case (mechanism, first) if not request.options:
                return Reply(scram.encode(self._ask(mechanism, scram.decode(first))))
            case (final,) if not request.options and self._challenge is not None:
                return Reply(scram.encode(self._judge(self._challenge, scram.decode(final))))
        raise UsageError(f"usage: auth {MECHANISM} BASE64, then auth BASE64")

    def _ask(self, mechanism: str, first: bytes) -> bytes:
        if mechanism.upper() != MECHANISM:
            raise UsageError(f"unrecognized mechanism: this relay has {MECHANISM}")
        hello = Hello.parse(first)
        self._said = hello.name
        verifier = self._gate.verifier_of(hello.name)
        self._challenge = Challenge(hello, verifier, secrets.token_urlsafe(NONCE_OCTETS))
        return self._challenge.message

    def _judge(self, challenge: Challenge, final: bytes) -> bytes:
        self._challenge = None  # one try each: a nonce is used once
        proof = challenge.accept(final)
        credential = self._gate.admit(challenge.hello.name, self._host)
        if credential is None or credential.proof != challenge.verifier:
            raise NotAllowedError(FAILED)
        self._credential = credential
        self._on_known()
        return proof
