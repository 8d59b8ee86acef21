"""Authentication of one control connection: the credential of its peer, and the verb `auth`.

unauthenticated ──auth SCRAM-SHA-256 FIRST──► challenged ──auth FINAL──► authenticated
    ▲                                             │ proof is wrong, or FIRST instead of FINAL
    └─────────────────────────────────────────────┘     at most MAX_LOGIN_FAILURES times, until one deadline
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthSlot
from tunneld.config.credentials import Credential
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.wire import scram
from tunneld.wire.lines import ControlRequest
from tunneld.wire.scram import FAILED, Challenge, Hello
from tunneld.wire.verifier import MECHANISM

AUTH = "auth"

MAX_LOGIN_FAILURES = 3
"""Per connection: room for a person's typing errors; after that, each guess costs a new connection."""

NONCE_BYTES = 18
"""Random bytes of a nonce, 24 characters in base64: no nonce occurs twice."""


class LoginState:
    """The authentication state of one control connection.

    `host` and `peer` are the address of the peer without and with its port, `local_host` is our address.
    `certificate` is the client certificate (DER) that TLS has verified, if any. `on_authenticated` is called with
    the grant when `auth` succeeds; it may raise `LimitReachedError`, and then the peer stays unauthenticated. `slot` is
    the place of the connection until then.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        host: str,
        peer: str,
        local_host: str,
        certificate: bytes | None = None,
        on_authenticated: Callable[[Grant], None] = lambda _grant: None,
        slot: PreauthSlot | None = None,
    ) -> None:
        self.failures = 0
        self.refused = False  # the proof was right, and there is no place for the connection
        self._at_end: dict[str, Callable[[], None]] = {}
        self._on_authenticated = on_authenticated
        self._slot = slot or PreauthSlot.exempt()
        self._authenticator = authenticator
        self._host, self._peer, self._local_host = host, peer, local_host
        self._has_certificate = certificate is not None
        self._credential: Credential | None = (
            authenticator.admit_certificate(certificate, host) if certificate else None
        )
        if self._credential is not None:
            authenticator.remember_login(host, self._credential.name)
        self._challenge: Challenge | None = None
        self._claimed_name = ""  # of the latest attempt

    @property
    def grant(self) -> Grant | None:
        """The present grant of the peer; None while it is unauthenticated, or if its credential was revoked."""
        if self._authenticator.is_open:
            return EVERYBODY
        return None if self._credential is None else self._authenticator.renew(self._credential)

    def enter(self) -> None:
        """Call `on_authenticated` if the peer needs no `auth`. Raises what it raises."""
        if (grant := self.grant) is not None:
            self._on_authenticated(grant)

    def check_revoked(self) -> None:
        """Raise `NotAllowedError` if the credential of an authenticated peer is no longer valid."""
        if self._credential is not None and self.grant is None:
            raise NotAllowedError(
                f"credential {self._credential.name!r} was removed or its secret changed since you authenticated"
            )

    @property
    def caller(self) -> Requester:
        """The peer as the verbs see it."""
        grant = self.grant
        owner = f"{grant.name}@{self._peer}" if grant and grant.name else self._peer
        return Requester(
            self._host,
            owner,
            self._local_host,
            grant,
            lambda: self.grant,
            self._at_end.__setitem__,
            can_hand_over=True,
            port=int(self._peer.rpartition(":")[2] or 0),
        )

    def close(self) -> None:
        """Run the callbacks that verbs registered for the end of the connection. The server calls this once."""
        if self._credential is not None:  # until now, a peer at this address was authenticated
            self._authenticator.remember_login(self._host, self._credential.name)
        while self._at_end:
            self._at_end.popitem()[1]()

    @property
    def method(self) -> str:
        """The value of `auth=` in the greeting."""
        if self.grant is None:
            return MECHANISM.lower()
        return "certificate" if self._has_certificate else "none"

    def log_limited(self, write: Callable[..., object], event: str, **facts: object) -> None:
        """Log an event that a peer can cause without authentication, see `Authenticator.log_limited`."""
        self._authenticator.log_limited(write, event, "control", **facts)

    def authenticate(self, request: ControlRequest) -> Reply:
        """Take one step of an authentication, the verb `auth`.

        Raises `NotAllowedError` for a wrong proof, `UsageError` for a malformed or unnecessary step, and
        `LimitReachedError` if the name or the address has a penalty from failures on other connections. `failures`
        counts failed steps.
        """
        if self._authenticator.is_open:
            raise UsageError("this relay does not require authentication")
        if self.grant is not None:
            raise UsageError("already authenticated; open a new connection to use another credential")
        try:
            return self._step(request)
        except LimitReachedError:
            self.failures += 1
            raise
        except (NotAllowedError, UsageError) as error:
            self._challenge = None
            self._slot.has_begun = False  # it is counted as a failure instead
            self.failures += 1
            self._authenticator.log_failure(self._host, "control", str(error), self._claimed_name)
            raise

    def _step(self, request: ControlRequest) -> Reply:
        match request.args:
            case (mechanism, first) if not request.options:
                return Reply(scram.encode(self._make_challenge(mechanism, scram.decode(first))))
            case (final,) if not request.options and self._challenge is not None:
                return Reply(scram.encode(self._check_proof(self._challenge, scram.decode(final))))
        raise UsageError(f"usage: auth {MECHANISM} BASE64, then auth BASE64")

    def _make_challenge(self, mechanism: str, first: bytes) -> bytes:
        if mechanism.upper() != MECHANISM:
            raise UsageError(f"unrecognized mechanism; this relay supports {MECHANISM}")
        if self._challenge is not None:  # else one connection could ask for the challenges of countless names
            raise UsageError("the challenge before this was not answered")
        hello = Hello.parse(first)
        self._claimed_name = hello.name
        self._check_block(hello.name)
        self._slot.has_begun = True  # a client that leaves now has learnt a salt for nothing
        verifier = self._authenticator.verifier_of(hello.name)
        self._challenge = Challenge(hello, verifier, secrets.token_urlsafe(NONCE_BYTES))
        return self._challenge.message

    def _check_proof(self, challenge: Challenge, final: bytes) -> bytes:
        self._challenge = None  # a nonce is used once
        self._check_block(challenge.hello.name)  # checked again, else each open connection would allow a guess
        proof = challenge.accept(final)
        credential = self._authenticator.admit(challenge.hello.name, self._host)
        if credential is None or credential.proof != challenge.verifier:
            raise NotAllowedError(FAILED)
        try:
            self._on_authenticated(credential.grant)
        except LimitReachedError:
            self.refused = True
            self._slot.has_begun = False  # the proof was right
            raise
        self._credential = credential
        self._authenticator.remember_login(self._host, credential.name)
        return proof

    def _check_block(self, name: str) -> None:
        if (block := self._authenticator.block(self._host, name)) is not None:
            raise LimitReachedError(block.reason)
