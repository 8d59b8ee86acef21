"""Who may speak: the credentials in force, and the proofs by which a face knows one.

Nothing here tells a stranger whether a name exists. A name that does not has a verifier all the same, which nobody's
secret fits: the same work, the same answers, a salt that stays the same for as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import trio

from tunneld.auth.preauth import PreauthLimiter, PreauthRefusal
from tunneld.config.credentials import Credential, own_digest, own_salt
from tunneld.config.schema import ControlSettings
from tunneld.policy.access import Grant
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.tls.pins import SUBJECT, fingerprint, subject
from tunneld.wire.verifier import ITERATIONS, Verifier, matches

log: structlog.stdlib.BoundLogger = structlog.get_logger("gate")

MAX_REMEMBERED = 1000
"""Secrets said in clear that were found right, as digests: more credentials than that pay for each request."""


REFUSALS_LOGGED = Rate(10, 60)
"""Lines about refused strangers: enough to see a flood and some of its sources, not enough to be one."""


class Authenticator:
    """The credentials, asked anew each time, so that a reload applies to connections that are open; and the strangers
    of all faces. `clock` is in seconds.
    """

    def __init__(
        self,
        credentials: Callable[[], Sequence[Credential]],
        strangers: PreauthLimiter | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.preauth = PreauthLimiter(ControlSettings) if strangers is None else strangers
        self._clock = clock
        self._thinning = LogLimiter(REFUSALS_LOGGED)
        self._credentials = credentials
        self._asks = False
        self._deriving = trio.CapacityLimiter(1)  # one core at most for guesses, whoever makes them
        self._right: set[bytes] = set()

    @property
    def is_open(self) -> bool:
        """Whether nobody is asked. Once there were credentials, taking the last one away admits nobody, not everybody:
        the listeners may be where strangers can reach them.
        """
        self._asks = self._asks or bool(self._credentials())
        return not self._asks

    @property
    def credentials(self) -> Sequence[Credential]:
        """Those in force."""
        return self._credentials()

    def verifier_of(self, name: str) -> Verifier:
        """What to challenge this name with, whether there is such a credential or not."""
        pretended = self._pretend(name)
        credential = self._find(name)
        return pretended if credential is None or credential.proof is None else credential.proof

    def admit(self, name: str, host: str) -> Credential | None:
        """The credential of this name, whose secret was proved, if it may be used from the address `host`."""
        credential = self._find(name)
        known = credential is not None and credential.proof is not None and credential.grant.admits(host)
        return credential if known else None

    def admit_certificate(self, certificate: bytes, host: str) -> Credential | None:
        """The credential of a certificate in DER that TLS has verified: by its fingerprint, or else by its subject."""
        known = [each for each in self._credentials() if each.certificate is not None and each.grant.admits(host)]
        shown = fingerprint(certificate)
        found = next((credential for credential in known if credential.certificate == shown), None)
        if found is None and any(str(each.certificate).startswith(SUBJECT) for each in known):
            shown = subject(certificate)
            found = next((credential for credential in known if credential.certificate == shown), None)
        return found

    async def admit_secret(self, name: str, secret: str, host: str) -> Credential | None:
        """The credential whose secret was said in clear. As slow for unknown names as for known ones, and for who is
        right at a wrong place, or that would be told by how soon it is refused.
        """
        verifier = self.verifier_of(name)
        digest = own_digest("right", name, secret, verifier.reveal())
        credential = self.admit(name, host)
        if credential is not None and digest in self._right:  # a keyed digest: how this compares tells nobody anything
            return credential
        if not await trio.to_thread.run_sync(matches, verifier, secret, limiter=self._deriving):
            return None
        self._remember(digest)
        return self.admit(name, host)

    def renew(self, credential: Credential) -> Grant | None:
        """What a credential that was admitted earlier may do now; None where it is gone or has another secret."""
        now = self._find(credential.name)
        if now is None or (now.proof, now.certificate, now.authorized_keys) != (
            credential.proof,
            credential.certificate,
            credential.authorized_keys,
        ):
            return None
        return now.grant

    def log_failure(self, host: str, face: str, reason: str, name: str = "") -> None:
        """The line that fail2ban reads, see tunneld(8): nothing in it is chosen by the stranger but the address. `name`
        is who it said it is; one that is no credential's stays out, for it may be a secret in the wrong place.
        """
        whose = {} if self._find(name) is None else {"credential": name}
        log.warning("authentication failed", peer=host, face=face, reason=reason, **whose)
        self.preauth.fail(host, self._clock())

    def log_refusal(self, host: str, face: str, refusal: PreauthRefusal) -> None:
        """Log that a stranger was refused; in a flood a few, and with the next one how many were left out."""
        left_out = self._thinning.passes(self._clock())
        if left_out is not None:
            log.warning("stranger refused", peer=host, face=face, reason=refusal.reason, left_out=left_out)

    def penalty(self, host: str) -> float:
        """For how many more seconds nobody at `host` is let in; 0.0 where there is no penalty."""
        return self.preauth.penalty(host, self._clock())

    def _find(self, name: str) -> Credential | None:
        return next((credential for credential in self._credentials() if credential.name == name), None)

    def _pretend(self, name: str) -> Verifier:
        """A verifier for a name that has none, with the count and the length of salt of one that exists."""
        proofs = [credential.proof for credential in self._credentials() if credential.proof is not None]
        salt, iterations = own_salt(name), ITERATIONS
        if proofs:
            model = proofs[own_digest("model", name)[0] % len(proofs)]
            salt, iterations = (salt * len(model.salt))[: len(model.salt)], model.iterations
        return Verifier(iterations, salt, own_digest("stored", name), own_digest("server", name))

    def _remember(self, digest: bytes) -> None:
        if len(self._right) >= MAX_REMEMBERED:
            self._right.clear()
        self._right.add(digest)
