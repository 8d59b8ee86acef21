"""`[[credential]]`: a name, a way to authenticate, and permissions.

The file never contains a secret, but a verifier of it, or the place of the secret. A secret that is read from there is
turned into a verifier at once and discarded.
"""

from __future__ import annotations

import codecs
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

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

from tunneld.config.paths import locate
from tunneld.config.salts import SALT_BYTES, derive_salt
from tunneld.config.values import (
    MILLISECOND,
    YEAR,
    ByteCount,
    File,
    Loading,
    NetworkText,
    Table,
    parse_port_range,
)
from tunneld.config.wording import literal
from tunneld.errors import UsageError, reason_of
from tunneld.net.endpoint import parse_network
from tunneld.net.node_id import NodeId
from tunneld.policy.access import GRANT_LIMITS, Grant, Role
from tunneld.tls.pins import SUBJECT, parse_pin, parse_subject
from tunneld.wire.verifier import Verifier, check_secret, derive

PROOFS = ("verifier", "secret_file", "secret_env", "certificate", "authorized_keys")
"""Keys of `[[credential]]` by which it authenticates."""

MAX_SECRET_BYTES = 1024
"""Size of a secret file in bytes: a larger one is the wrong file."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BACKEND = re.compile(r"[a-z][a-z0-9-]*")
_VISIT_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._*-]{0,63}@[A-Za-z0-9_*-]{1,27}")
_NAME_PATTERN = re.compile(r"[a-z0-9*?]([a-z0-9*?.-]{0,251}[a-z0-9*?])?")
_PROCESS_KEY = secrets.token_bytes(32)


def make_verifier(secret: str) -> str:
    """The value of `verifier =` for a new secret, with a new random salt each time.

    Raises `UsageError` unless the secret is printable ASCII of 8 characters or more.
    """
    check_secret(secret)
    return derive(secret, secrets.token_bytes(SALT_BYTES)).reveal()


def process_digest(*parts: str) -> bytes:
    """32 bytes derived from `parts` with a random key of this process: outside it they look random."""
    return hmac.digest(_PROCESS_KEY, "\0".join(parts).encode("utf-8", "surrogatepass"), "sha256")


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{literal(value)} is not {what}")
        return value

    return AfterValidator(check)


def _verifier(value: object) -> Verifier:
    """Parse a verifier. Invalid input may be a secret, so it is never quoted."""
    if isinstance(value, Verifier):
        return value
    if not isinstance(value, str):
        raise ValueError("not a verifier: expected a string in quotes")  # noqa: TRY004  pydantic wants ValueError
    try:
        return Verifier.parse(value)
    except UsageError as error:
        raise ValueError(f"not a verifier: {error}") from None


def _certificate(value: str) -> str:
    """Normalise a fingerprint (as OpenSSL prints it, or in lower case) or a subject."""
    try:
        return parse_subject(value) if value.startswith(SUBJECT) else parse_pin(value)
    except UsageError:
        forms = "a fingerprint (sha256: and 64 hexadecimal digits) nor a subject (subject:CN=alice)"
        raise ValueError(f"{literal(value)} is neither {forms}") from None


def _ports(value: str) -> str:
    if parse_port_range(value)[0] == 0:
        raise ValueError("port 0 cannot be requested; omit the key to allow every port")
    return value


def _node(value: str) -> str:
    try:
        return str(NodeId.parse(value))
    except UsageError as error:
        raise ValueError(str(error)) from None


def _not_empty(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value == ():
        raise ValueError("an empty array allows nothing; omit the key to allow everything")
    return value


FromArray = Field(strict=False)  # a TOML array becomes a tuple
BackendNames = Annotated[
    tuple[Annotated[str, _matching(_BACKEND, "a backend")], ...] | None, FromArray, AfterValidator(_not_empty)
]
PortRanges = Annotated[tuple[Annotated[str, AfterValidator(_ports)], ...] | None, FromArray, AfterValidator(_not_empty)]
Networks = Annotated[tuple[NetworkText, ...] | None, FromArray, AfterValidator(_not_empty)]
NamePatterns = Annotated[
    tuple[Annotated[str, _matching(_NAME_PATTERN, "a host name, such as blog, alice-* or shop.example.com")], ...]
    | None,
    FromArray,
    AfterValidator(_not_empty),
]
VisitPatterns = Annotated[
    tuple[Annotated[str, _matching(_VISIT_PATTERN, "NAME@ID of private tunnels, such as shell@* or *@*")], ...] | None,
    FromArray,
]
NodeIds = Annotated[tuple[Annotated[str, AfterValidator(_node)], ...] | None, FromArray]
SecretVerifier = Annotated[Verifier, PlainValidator(_verifier), PlainSerializer(Verifier.reveal, return_type=str)]
OptionalCount = Annotated[int | None, Field(ge=1, le=1_000_000)]
OptionalSeconds = Annotated[float | None, Field(ge=MILLISECOND, le=YEAR, allow_inf_nan=False)]


def _authorized_key(value: str) -> str:
    """Check a line of authorized_keys. A line that ssh would silently skip is an error here."""
    from tunneld.config.ssh_keys import check_line  # noqa: PLC0415  # asyncssh takes half a second to import

    check_line(value)
    return value


class Credential(Table):
    """One `[[credential]]`. A limit that is not set is that of `[tunnels]`."""

    model_config = ConfigDict(hide_input_in_errors=True)

    name: Annotated[str, _matching(_NAME, "a name of at most 64 letters, digits, dots, dashes and underscores")]
    role: Literal["user", "viewer", "admin"] = "user"
    verifier: SecretVerifier | None = None
    secret_file: File | None = None
    secret_env: Annotated[str, _matching(_VARIABLE, "the name of an environment variable")] | None = None
    certificate: Annotated[str, AfterValidator(_certificate)] | None = None
    authorized_keys: Annotated[tuple[Annotated[str, AfterValidator(_authorized_key)], ...] | None, FromArray] = None
    nodes: NodeIds = None  # EGTP nodes that may pass messages along in its name
    backends: BackendNames = None
    ports: PortRanges = None
    bind: Networks = None
    networks: Networks = None
    names: NamePatterns = None
    visit: VisitPatterns = None
    server_from: Networks = None
    max_tunnels: OptionalCount = None
    max_visitors: OptionalCount = None
    max_ttl: OptionalSeconds = None
    bandwidth: ByteCount = None
    quota: ByteCount = None
    max_total_visitors: OptionalCount = None
    total_bandwidth: ByteCount = None

    _proof: Verifier | None = PrivateAttr(default=None)
    _locate = field_validator("secret_file")(locate)

    @model_validator(mode="after")
    def _has_one_proof(self, info: ValidationInfo) -> Credential:
        """Require at most one form of the secret, and at least one of secret, certificate and SSH keys. A secret kept
        elsewhere is read while a file is loaded.
        """
        forms = [form for form in ("verifier", "secret_file", "secret_env") if getattr(self, form) is not None]
        if len(forms) > 1:
            raise ValueError(f"{literal(self.name)} has {' and '.join(forms)}; use only one of them")
        if not forms and self.certificate is None and self.authorized_keys is None:
            raise ValueError(
                f"{literal(self.name)} has no verifier, secret_file, secret_env, certificate or authorized_keys"
            )
        self._proof = self.verifier
        if isinstance(info.context, Loading) and self.verifier is None and forms:
            self._proof = self._read_secret(info.context.salt_key)
        return self

    def _read_secret(self, salt_key: bytes) -> Verifier:
        try:
            secret = _from_file(self.secret_file) if self.secret_file else _from_environment(self.secret_env or "")
            check_secret(secret)
        except UsageError as error:
            raise ValueError(f"{self.secret_file or self.secret_env}: {error}") from None
        return derive(secret, derive_salt(salt_key, self.name))

    @property
    def proof(self) -> Verifier | None:
        """The verifier of its secret, wherever that is kept; None if it has no secret."""
        return self._proof

    @property
    def proofs(self) -> list[str]:
        """The keys by which it authenticates."""
        return [key for key in PROOFS if getattr(self, key)]

    @property
    def grant(self) -> Grant:
        """Its permissions and limits."""
        parsers = {"ports": parse_port_range, **dict.fromkeys(("bind", "networks", "server_from"), parse_network)}
        limits: dict[str, Any] = {key: getattr(self, key) for key in GRANT_LIMITS}
        for key, parse in parsers.items():
            if limits[key] is not None:
                limits[key] = tuple(map(parse, limits[key]))
        return Grant(name=self.name, role=Role(self.role), **limits)


def check_unique(credentials: Sequence[Credential]) -> None:
    """Raise `ValueError` if two have the same name or the same certificate."""
    for kind in ("name", "certificate"):
        values = [value for credential in credentials if (value := getattr(credential, kind)) is not None]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"the {kind} {literal(value)} occurs {values.count(value)} times; it must be unique")


def _from_file(path: Path) -> str:
    """The secret in a file: its only line, without the line end and a byte order mark."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise UsageError(f"could not be read: {reason_of(error)}") from None
    if len(content) > MAX_SECRET_BYTES:
        raise UsageError(f"larger than {MAX_SECRET_BYTES} bytes; this is not a file with a secret")
    return content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")


def _from_environment(name: str) -> str:
    if (secret := os.environ.get(name)) is None:
        raise UsageError("this environment variable is not set")
    return secret
