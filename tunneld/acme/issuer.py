"""Gets certificates from an ACME authority (RFC 8555), such as Let's Encrypt. Blocking: runs in a worker thread.

    account ──► order for names ──► a challenge for each ──► finalize with a CSR ──► chain
                                     └ presented by a `Responder`, removed afterwards

The `acme` package of the Certbot project speaks the protocol. What depends on time (when to renew, when to try again,
how often) is `schedule`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import requests
from acme import client, errors, messages
from acme.challenges import KeyAuthorizationChallenge
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from josepy.errors import Error as JoseError
from josepy.jwa import ES256
from josepy.jwk import JWKEC

from tunneld import __version__
from tunneld.acme.challenges import Responder
from tunneld.acme.state import Issued
from tunneld.errors import CertificateError
from tunneld.tls.private_files import temporary_beside, write_private

PREFERENCE = ("tls-alpn-01", "http-01", "dns-01")
"""Challenges in the order in which they are tried: the first needs only the port that the certificate is for."""

MAX_NONCE_ATTEMPTS = 5
"Times that a request is sent twice where its nonce is rejected: ten rejections in a row are a broken authority."


_account_lock = threading.Lock()
"""Two orders at once, each in its thread, must not make two accounts."""


def _ignore(_step: str) -> None:
    pass


@dataclass(slots=True)
class Issuer:
    """One authority, and our account there."""

    directory: str  # its URL
    contact: str  # an e-mail address, or empty
    account_file: Path  # the account's private key in PEM; made at the first order
    responders: Mapping[str, Responder]  # by challenge type
    profile: str = ""  # as the authority names it: `shortlived` for certificates of six days
    ca_file: Path | None = None  # verifies the authority's own HTTPS; None: the system's certificates
    timeout: float = 30.0  # seconds, of one request
    deadline: float = 180.0  # seconds, of one order
    _client: client.ClientV2 | None = field(default=None, repr=False)

    def obtain(self, names: Sequence[str], attempt: int = 0, on_step: Callable[[str], None] = _ignore) -> Issued:
        """Order a certificate for these names; a name may begin with `*.`. Raises `CertificateError`, or `UsageError`
        of a responder.

        Of several challenges that are possible, `attempt` chooses another one each time. `on_step` is told what has
        been done.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        failed = f"could not get a certificate for {', '.join(names)}"
        try:
            chain = self._order(_request(names, key), attempt, on_step)
        except errors.ValidationError as error:
            raise CertificateError(f"{failed}: {_why(error)}") from None
        except errors.TimeoutError:
            raise CertificateError(f"{failed}: not ready after {self.deadline:g} s (acme.order_timeout)") from None
        except (errors.Error, messages.Error, JoseError, requests.RequestException, OSError, ValueError) as error:
            raise CertificateError(f"{failed}: {_reason(error)}") from None
        return Issued(chain, pem)

    def renewal_time(self, chain: bytes) -> tuple[datetime | None, datetime]:
        """When the authority suggests to renew (RFC 9773; None: it does not say), and when to ask again; both in UTC.
        Raises `CertificateError`.
        """
        try:
            when, again = self._connected().renewal_time(chain)
        except (errors.Error, messages.Error, requests.RequestException, OSError, ValueError) as error:
            raise CertificateError(f"could not ask when to renew: {_reason(error)}") from None
        return _utc(when) if when is not None else None, _utc(again)

    def _order(self, request: bytes, attempt: int, on_step: Callable[[str], None]) -> bytes:
        connected = self._connected()
        on_step(f"the account at {self.directory} is usable")
        deadline = datetime.now() + timedelta(seconds=self.deadline)  # `acme` compares it with local time  # noqa: DTZ005
        order = connected.new_order(request, self.profile or None)
        on_step("the authority accepted the order")
        with ExitStack() as presented:
            for authorization in order.authorizations:
                if authorization.body.status != messages.STATUS_VALID:
                    kind = self._answer(connected, authorization, attempt, presented)
                    on_step(f"the answer to {kind} for {authorization.body.identifier.value} is in place")
            order = connected.poll_authorizations(order, deadline)
            on_step("the authority has validated all names")
        return connected.finalize_order(order, deadline).fullchain_pem.encode()

    def _answer(
        self,
        connected: client.ClientV2,
        authorization: messages.AuthorizationResource,
        attempt: int,
        presented: ExitStack,
    ) -> str:
        """Present the answer to one of the challenges of a name, and tell the authority. Returns its type."""
        name: str = authorization.body.identifier.value
        offered = {
            challenge.chall.typ: challenge
            for challenge in authorization.body.challenges
            if isinstance(challenge.chall, KeyAuthorizationChallenge)  # others are newer than this program
        }
        possible = [kind for kind in PREFERENCE if kind in offered and kind in self.responders]
        if not possible:
            raise CertificateError(
                f"could not prove {name}: the authority offers {', '.join(offered) or 'no challenge'}, "
                f"this relay answers {', '.join(self.responders) or 'none'} (a wildcard needs acme.dns_hook or "
                "acme.rfc2136)"
            )
        kind = possible[attempt % len(possible)]
        challenge, responder = offered[kind], self.responders[kind]
        response, validation = challenge.response_and_validation(connected.net.key)
        presented.callback(partial(responder.remove, name, challenge.chall, validation))
        responder.present(name, challenge.chall, validation)
        connected.answer_challenge(challenge, response)
        return kind

    def _connected(self) -> client.ClientV2:
        """The client, with the account registered."""
        if self._client is None:
            key = JWKEC(key=_account_key(self.account_file))
            network = _Network(
                key, alg=ES256, user_agent=f"tunneld/{__version__}", timeout=round(self.timeout),
                verify_ssl=cast(bool, str(self.ca_file)) if self.ca_file is not None else True,  # requests takes a path
            )  # fmt: skip
            connected = client.ClientV2(client.ClientV2.get_directory(self.directory, network), network)
            registration: Any = messages.NewRegistration.from_data(
                email=self.contact or None, terms_of_service_agreed=True
            )
            try:
                network.account = connected.new_account(registration)
            except errors.ConflictError as known:  # of an earlier start
                network.account = messages.RegistrationResource(uri=known.location, body=messages.Registration())
            self._client = connected
        return self._client


class _Network(client.ClientNetwork):
    """Requests of `acme`, which sends one with a rejected nonce once more; a busy authority may reject several in a row
    (RFC 8555 §6.5).
    """

    def post(self, *args: Any, **kwargs: Any) -> requests.Response:
        """See `acme.client.ClientNetwork.post`."""
        for _ in range(MAX_NONCE_ATTEMPTS - 1):
            try:
                return super().post(*args, **kwargs)
            except messages.Error as error:
                if error.code != "badNonce":
                    raise
        return super().post(*args, **kwargs)


def _account_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The account's key; made where there is none. A lost key costs a new account, nothing else."""
    with _account_lock:
        if path.exists():
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise CertificateError(f"{path} is no key of an ACME account: remove it to register again")
            return key
        key = ec.generate_private_key(ec.SECP256R1())
        new = temporary_beside(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        write_private(
            new,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
        new.replace(path)
        return key


def _request(names: Sequence[str], key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate signing request in PEM."""
    common = [name for name in names if len(name) <= 64][:1]  # RFC 5280 A.1, ub-common-name
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _why(error: errors.ValidationError) -> str:
    """What the authority found wrong, by name."""
    reasons = [
        f"{authorization.body.identifier.value}: {_reason(challenge.error)} ({challenge.chall.typ})"
        for authorization in error.failed_authzrs
        for challenge in authorization.body.challenges
        if challenge.error is not None
    ]
    return "; ".join(reasons) or "the authority did not say why"


def _reason(error: BaseException) -> str:
    if isinstance(error, messages.Error):
        return f"{error.detail or error.title or 'refused'} [{(error.typ or '').rpartition(':')[2]}]"
    if isinstance(error, requests.RequestException):
        return f"could not reach the authority: {type(error).__name__}"
    return str(error) or type(error).__name__


def _utc(when: datetime) -> datetime:
    return when.astimezone(UTC)
