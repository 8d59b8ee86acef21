"""The credentials in force, and how each service of the relay checks one: SCRAM proof, secret in clear, certificate.

Nothing here reveals whether a credential name exists. An unknown name gets a verifier of its own that no secret
matches: the work, the answers and the salt look the same, and the salt stays the same (config/salts.py). Real and
unknown names take the same path, up to one look-up in a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import trio

from tunneld.auth.penalties import Block, Claim
from tunneld.auth.preauth import PreauthLimiter, PreauthRefusal
from tunneld.config.credentials import Credential, process_digest
from tunneld.config.salts import PROCESS_KEY, SALT_BYTES, derive_salt
from tunneld.config.schema import ControlSettings
from tunneld.policy.access import Grant
from tunneld.policy.networks import source_text
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.tls.pins import SUBJECT, fingerprint, subject
from tunneld.wire.lines import Item
from tunneld.wire.verifier import ITERATIONS, Verifier, matches

log: structlog.stdlib.BoundLogger = structlog.get_logger("auth")

MAX_VERIFIED_SECRETS = 1000
"""Digests of secrets received in clear and found correct. Beyond that the cache starts empty again."""

PREAUTH_LOG_RATE = Rate(10, 60)
"""Log lines of one kind that unauthenticated peers cause: enough to show a flood and some of its sources, too few to
become one. "authentication failed" is exempt, since fail2ban needs each of them; penalties limit it.
"""

MAX_LOG_KINDS = 64
"""Kinds of such lines, by service and event: all that there are."""


class CredentialIndex:
    """The credentials in force, by name, and what a verifier of an unknown name must look like."""

    def __init__(self, credentials: Sequence[Credential]) -> None:
        self.credentials = tuple(credentials)
        self.by_name = {credential.name: credential for credential in credentials}
        self.verifiers = {name: each.proof for name, each in self.by_name.items() if each.proof is not None}
        forms = {(verifier.iterations, len(verifier.salt)) for verifier in self.verifiers.values()}
        self._forms = sorted(forms) or [(ITERATIONS, SALT_BYTES)]

    def pretend(self, name: str, salt_key: bytes) -> Verifier:
        """A verifier for a name without one, with the iteration count and salt length of an existing verifier: as long
        as one like that exists, the same for this name, whichever credentials are added and removed.
        """
        iterations, length = max(self._forms, key=lambda form: derive_salt(salt_key, f"{form} of {name}"))
        salt = derive_salt(salt_key, name, length)
        return Verifier(iterations, salt, process_digest("stored", name), process_digest("server", name))


class Authenticator:
    """Checks credentials for every service of the relay, and owns the limits on unauthenticated connections.

    `credentials` is called at each check, so that a reload applies to connections that are already open. `preauth`
    defaults to a limiter with default settings. `clock` returns seconds. `salt_key` is that of config/salts.py.
    """

    def __init__(
        self,
        credentials: Callable[[], Sequence[Credential]],
        preauth: PreauthLimiter | None = None,
        clock: Callable[[], float] = trio.current_time,
        salt_key: bytes = PROCESS_KEY,
    ) -> None:
        self.preauth = PreauthLimiter(ControlSettings) if preauth is None else preauth
        self._clock = clock
        self._salt_key = salt_key
        self._log_limiter = LogLimiter(PREAUTH_LOG_RATE, MAX_LOG_KINDS)
        self._credentials = credentials
        self._last_index = CredentialIndex(())
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
        index = self._index
        return index.verifiers.get(name, index.pretend(name, self._salt_key))

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

    # Failures, logins and penalties

    def log_failure(self, host: str, service: str, reason: str, name: str = "", claim: Claim | None = None) -> None:
        """Count a failed authentication against `host` and write the log line that fail2ban reads, see tunneld(8).

        A peer controls nothing in this line but its address. `name` is the credential that it named; a name that is
        not a credential's is left out, because it may be a secret typed in the wrong place. `claim` is what it claimed
        to be otherwise.
        """
        credential = {} if self._find(name) is None else {"credential": name}
        log.warning("authentication failed", peer=host, service=service, reason=reason, **credential)
        self.preauth.fail(host, self._clock(), claim_of("name", name) if name else claim)

    def remember_login(self, host: str, name: str = "") -> None:
        """Record that a peer at `host` is authenticated, as the credential `name` or with the key of a tunnel."""
        self.preauth.succeed(host, self._clock(), claim_of("name", name) if name else None)

    def block(self, host: str, name: str = "") -> Block | None:
        """Why a login as `name` from `host` is refused now, whether or not its secret is right; None if it is not."""
        return self.preauth.block(host, claim_of("name", name) if name else None, self._clock())

    def penalty(self, host: str) -> float:
        """Seconds for which connections from `host` are still refused; 0.0 if it has no penalty."""
        return self.preauth.penalty(host, self._clock())

    def penalties(self) -> list[Item]:
        """The penalties in force: the items of the verb of this name. A name that is no credential's is left out."""
        names = {claim_of("name", credential.name): credential.name for credential in self._credentials()}
        return [
            {
                "address": source_text(each.source),
                "credential": None if each.claim is None else names.get(each.claim),
                "failures": each.failures,
                "left": max(1, round(each.seconds)),
                "scope": "address" if each.claim is None else "name",
            }
            for each in self.preauth.report(self._clock())
        ]

    # The log

    def log_refusal(self, host: str, service: str, refusal: PreauthRefusal) -> None:
        """Log a connection refused before authentication."""
        self.log_limited(log.warning, "unauthenticated connection refused", service, peer=host, reason=refusal.reason)

    def log_limited(self, write: Callable[..., object], event: str, service: str, **facts: object) -> None:
        """Log an event that an unauthenticated peer can cause at will. In a flood only some are logged; `left_out` of
        the next line of this event and service counts the rest.
        """
        left_out = self._log_limiter.passes(self._clock(), (event, service))
        if left_out is not None:
            write(event, service=service, **facts, left_out=left_out)

    @property
    def _index(self) -> CredentialIndex:
        credentials = tuple(self._credentials())
        if credentials != self._last_index.credentials:  # unchanged objects are not compared deeply
            self._last_index = CredentialIndex(credentials)
        return self._last_index

    def _find(self, name: str) -> Credential | None:
        return self._index.by_name.get(name)

    def _remember(self, digest: bytes) -> None:
        if len(self._verified) >= MAX_VERIFIED_SECRETS:
            self._verified.clear()
        self._verified.add(digest)


def claim_of(kind: str, text: str) -> Claim:
    """The claim of a peer: the `name` of a credential, or a `key`."""
    return Claim(kind, process_digest("claim", kind, text)[:16])
