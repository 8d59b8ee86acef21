"""`[[credential]]`: a name, how it proves itself, and what it may do.

A secret is never in the file: it has a verifier of it, or says where it is. What is found there becomes a verifier at
once, and is forgotten.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tunneld.config.certificates import locate
from tunneld.config.values import MILLISECOND, YEAR, File, Loading, Octets, Table, literal, parse_port_range
from tunneld.errors import UsageError, reason_of
from tunneld.net.endpoint import parse_network
from tunneld.policy.access import Grant, Role
from tunneld.tls.pins import SUBJECT, parse_pin, parse_subject
from tunneld.wire.verifier import Verifier, check_secret, derive

LONGEST_SECRET = 1024  # octets of a secret's file: a larger one is the wrong file
SALT = 16  # octets: no two of 2^64 salts are equal

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BACKEND = re.compile(r"[a-z][a-z0-9-]*")
_PROCESS_KEY = secrets.token_bytes(32)


def make_verifier(secret: str) -> str:
    """The line to write behind `verifier =` for a new secret; another one each time.

    Raises `UsageError` unless the secret is printable ASCII of 8 characters or more.
    """
    check_secret(secret)
    return derive(secret, secrets.token_bytes(SALT)).reveal()


def own_digest(*parts: str) -> bytes:
    """32 octets that depend on `parts`, and that nobody outside this process can tell from random ones."""
    return hmac.digest(_PROCESS_KEY, "\0".join(parts).encode("utf-8", "surrogatepass"), "sha256")


def own_salt(name: str) -> bytes:
    """The salt of a name that has none of its own. It is the same whether there is such a credential or not."""
    return own_digest("salt", name)[:SALT]


def _a(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{literal(value)} is not {what}")
        return value

    return AfterValidator(check)


def _verifier(value: object) -> Verifier:
    """Read a verifier. What was written instead may be a secret: it is never repeated."""
    if isinstance(value, Verifier):
        return value
    if not isinstance(value, str):
        raise ValueError("not a verifier: not a string in quotes")  # noqa: TRY004  pydantic wants ValueError
    try:
        return Verifier.parse(value)
    except UsageError as error:
        raise ValueError(f"not a verifier: {error}") from None


def _certificate(value: str) -> str:
    """A fingerprint, as OpenSSL prints it or in small letters, or a subject."""
    try:
        return parse_subject(value) if value.startswith(SUBJECT) else parse_pin(value)
    except UsageError:
        forms = "neither of the form sha256: and 64 hexadecimal digits nor of the form subject:CN=alice"
        raise ValueError(f"{literal(value)} is {forms}") from None


def _network(value: str) -> str:
    try:
        return str(parse_network(value))
    except UsageError:
        raise ValueError(f"{literal(value)} is not an address or a network") from None


def _ports(value: str) -> str:
    if parse_port_range(value)[0] == 0:
        raise ValueError("port 0 cannot be asked for; leave the key out to allow every port")
    return value


def _some(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value == ():
        raise ValueError("an empty array allows nothing; leave the key out to allow everything")
    return value


Many = Field(strict=False)
Words = Annotated[tuple[Annotated[str, _a(_BACKEND, "a backend")], ...] | None, Many, AfterValidator(_some)]
Ports = Annotated[tuple[Annotated[str, AfterValidator(_ports)], ...] | None, Many, AfterValidator(_some)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...] | None, Many, AfterValidator(_some)]
Masked = Annotated[Verifier, PlainValidator(_verifier), PlainSerializer(Verifier.reveal, return_type=str)]
Most = Annotated[int | None, Field(ge=1, le=1_000_000)]  # as a count
Ttl = Annotated[float | None, Field(ge=MILLISECOND, le=YEAR, allow_inf_nan=False)]  # as seconds


def _authorized_key(value: str) -> str:
    """A line of authorized_keys: one that ssh would pass over in silence is a mistake here."""
    from tunneld.config.ssh_keys import check_line  # noqa: PLC0415  # asyncssh takes half a second to import

    check_line(value)
    return value


class Credential(Table):
    """Who may speak and open tunnels. What is not set is bounded by `[tunnels]` alone."""

    model_config = ConfigDict(hide_input_in_errors=True)

    name: Annotated[str, _a(_NAME, "a name of at most 64 letters, digits, dots, dashes and underscores")]
    role: Literal["user", "admin"] = "user"
    verifier: Masked | None = None
    secret_file: File | None = None
    secret_env: Annotated[str, _a(_VARIABLE, "the name of an environment variable")] | None = None
    certificate: Annotated[str, AfterValidator(_certificate)] | None = None
    authorized_keys: Annotated[tuple[Annotated[str, AfterValidator(_authorized_key)], ...] | None, Many] = None
    backends: Words = None
    ports: Ports = None
    networks: Networks = None
    server_from: Networks = None
    max_tunnels: Most = None
    max_visitors: Most = None
    max_ttl: Ttl = None
    bandwidth: Octets = None
    quota: Octets = None

    _proof: Verifier | None = PrivateAttr(default=None)
    _locate = field_validator("secret_file")(locate)

    @model_validator(mode="after")
    def _has_one_proof(self, info: ValidationInfo) -> Credential:
        """One form of the secret, or a certificate, or keys of SSH, or all three; what is elsewhere is fetched while a
        file is loaded.
        """
        forms = [form for form in ("verifier", "secret_file", "secret_env") if getattr(self, form) is not None]
        if len(forms) > 1:
            raise ValueError(f"{literal(self.name)} has {' and '.join(forms)}; it takes one of them")
        if not forms and self.certificate is None and self.authorized_keys is None:
            raise ValueError(
                f"{literal(self.name)} has no verifier, secret_file, secret_env, certificate or authorized_keys"
            )
        self._proof = self.verifier
        if isinstance(info.context, Loading) and self.verifier is None and forms:
            self._proof = self._fetch()
        return self

    def _fetch(self) -> Verifier:
        try:
            secret = _from_file(self.secret_file) if self.secret_file else _from_environment(self.secret_env or "")
            check_secret(secret)
        except UsageError as error:
            raise ValueError(f"{self.secret_file or self.secret_env}: {error}") from None
        return derive(secret, own_salt(self.name))

    @property
    def proof(self) -> Verifier | None:
        """The verifier of its secret, wherever that came from; None where it has a certificate only."""
        return self._proof

    @property
    def grant(self) -> Grant:
        """What it may do."""
        return Grant(
            name=self.name,
            role=Role(self.role),
            backends=self.backends,
            ports=None if self.ports is None else tuple(map(parse_port_range, self.ports)),
            networks=None if self.networks is None else tuple(map(parse_network, self.networks)),
            server_from=None if self.server_from is None else tuple(map(parse_network, self.server_from)),
            max_tunnels=self.max_tunnels,
            max_visitors=self.max_visitors,
            max_ttl=self.max_ttl,
            bandwidth=self.bandwidth,
            quota=self.quota,
        )


def check_unique(credentials: Sequence[Credential]) -> None:
    """Raise `ValueError` where two have the same name or the same certificate."""
    for kind in ("name", "certificate"):
        values = [value for credential in credentials if (value := getattr(credential, kind)) is not None]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"the {kind} {literal(value)} is there {values.count(value)} times; give it once")


def _from_file(path: Path) -> str:
    """The first line of a file is the secret, and there is no other."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_SECRET + 1)
    except OSError as error:
        raise UsageError(f"could not be read: {reason_of(error)}") from None
    if len(content) > LONGEST_SECRET:
        raise UsageError(f"larger than {LONGEST_SECRET} octets, which is no secret")
    return content.removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")


def _from_environment(name: str) -> str:
    if (secret := os.environ.get(name)) is None:
        raise UsageError("no such environment variable is set")
    return secret
