"""The credentials in force, and how each service of the relay checks one: SCRAM proof, secret in clear, certificate.

Nothing here reveals whether a credential name exists. An unknown name gets a verifier of its own that no secret
matches: the work, the answers and the salt look the same, and the salt stays the same while the process lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import trio

from tunneld.auth.preauth import PreauthLimiter, PreauthRefusal
from tunneld.config.credentials import Credential, default_salt, process_digest
from tunneld.config.schema import ControlSettings
from tunneld.policy.access import Grant
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.tls.pins import SUBJECT, fingerprint, subject
from tunneld.wire.verifier import ITERATIONS, Verifier, matches

log: structlog.stdlib.BoundLogger = structlog.get_logger("auth")

MAX_VERIFIED_SECRETS = 1000
"""Digests of secrets received in clear and found correct. Beyond that the cache starts empty again."""

PREAUTH_LOG_RATE = Rate(10, 60)
"""Log lines about refused connections: enough to show a flood and some of its sources, too few to become one."""


class Authenticator:
    """Checks credentials for every service of the relay, and owns the limits on unauthenticated connections.

    `credentials` is called at each check, so that a reload applies to connections that are already open. `preauth`
    defaults to a limiter with default settings. `clock` returns seconds.
    """

    def __init__(
        self,
        credentials: Callable[[], Sequence[Credential]],
        preauth: PreauthLimiter | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.preauth = PreauthLimiter(ControlSettings) if preauth is None else preauth
        self._clock = clock
        self._refusal_log = LogLimiter(PREAUTH_LOG_RATE)
        self._credentials = credentials
        self._had_credentials = False
        self._derivations = trio.CapacityLimiter(1)  # guessing uses at most one core
        self._verified: set[bytes] = set()

    @property
    def is_open(self) -> bool:
        """Whether the relay has no credentials, and so asks for none. Once it had any, this stays false: removing the
        last credential locks every caller out, because the listeners may be reachable from the network.
        """
        self._had_credentials = self._had_credentials or bool(self._credentials())
        return not self._had_credentials

    @property
    def credentials(self) -> Sequence[Credential]:
        """The credentials in force."""
        return self._credentials()

    def verifier_of(self, name: str) -> Verifier:
        """The verifier to challenge `name` with, whether or not there is such a credential."""
        decoy = self._decoy_verifier(name)
        credential = self._find(name)
        return decoy if credential is None or credential.proof is None else credential.proof

    def admit(self, name: str, host: str) -> Credential | None:
        """The credential `name`, if it has a secret and may be used from the address `host`. The caller has checked
        the secret.
        """
        credential = self._find(name)
        known = credential is not None and credential.proof is not None and credential.grant.admits(host)
        return credential if known else None

    def admit_certificate(self, certificate: bytes, host: str) -> Credential | None:
        """The credential of a certificate (DER) that TLS has verified: matched by fingerprint, then by subject."""
        usable = [each for each in self._credentials() if each.certificate is not None and each.grant.admits(host)]
        identity = fingerprint(certificate)
        found = next((credential for credential in usable if credential.certificate == identity), None)
        if found is None and any(str(each.certificate).startswith(SUBJECT) for each in usable):
            identity = subject(certificate)
            found = next((credential for credential in usable if credential.certificate == identity), None)
        return found

    async def admit_secret(self, name: str, secret: str, host: str) -> Credential | None:
        """The credential `name`, if `secret`, received in clear, is its secret and `host` may use it.

        Unknown names, and correct secrets from an address that may not use them, take as long as wrong secrets: the
        time until the refusal reveals nothing.
        """
        verifier = self.verifier_of(name)
        digest = process_digest("right", name, secret, verifier.reveal())
        credential = self.admit(name, host)
        if credential is not None and digest in self._verified:  # a keyed digest: the time of this lookup leaks nothing
            return credential
        if not await trio.to_thread.run_sync(matches, verifier, secret, limiter=self._derivations):
            return None
        self._remember(digest)
        return self.admit(name, host)

    def renew(self, credential: Credential) -> Grant | None:
        """The present grant of a credential that was admitted earlier; None if it was removed or has another secret,
        certificate or set of keys.
        """
        now = self._find(credential.name)
        if now is None or (now.proof, now.certificate, now.authorized_keys) != (
            credential.proof,
            credential.certificate,
            credential.authorized_keys,
        ):
            return None
        return now.grant

    def log_failure(self, host: str, service: str, reason: str, name: str = "") -> None:
        """Count a failed authentication against `host` and write the log line that fail2ban reads, see tunneld(8).

        A peer controls nothing in this line but its address. `name` is the credential that it named; a name that is
        not a credential's is left out, because it may be a secret typed in the wrong place.
        """
        credential = {} if self._find(name) is None else {"credential": name}
        log.warning("authentication failed", peer=host, service=service, reason=reason, **credential)
        self.preauth.fail(host, self._clock())

    def log_refusal(self, host: str, service: str, refusal: PreauthRefusal) -> None:
        """Log a connection refused before authentication. In a flood only some are logged; `left_out` of the next line
        counts the rest.
        """
        left_out = self._refusal_log.passes(self._clock())
        if left_out is not None:
            log.warning(
                "unauthenticated connection refused",
                peer=host,
                service=service,
                reason=refusal.reason,
                left_out=left_out,
            )

    def penalty(self, host: str) -> float:
        """Seconds for which connections from `host` are still refused; 0.0 if it has no penalty."""
        return self.preauth.penalty(host, self._clock())

    def _find(self, name: str) -> Credential | None:
        return next((credential for credential in self._credentials() if credential.name == name), None)

    def _decoy_verifier(self, name: str) -> Verifier:
        """A verifier for a name without one, with the iteration count and salt length of an existing verifier."""
        proofs = [credential.proof for credential in self._credentials() if credential.proof is not None]
        salt, iterations = default_salt(name), ITERATIONS
        if proofs:
            model = proofs[process_digest("model", name)[0] % len(proofs)]
            salt, iterations = (salt * len(model.salt))[: len(model.salt)], model.iterations
        return Verifier(iterations, salt, process_digest("stored", name), process_digest("server", name))

    def _remember(self, digest: bytes) -> None:
        if len(self._verified) >= MAX_VERIFIED_SECRETS:
            self._verified.clear()
        self._verified.add(digest)
