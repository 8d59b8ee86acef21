"""The tables of certificates: `[control.tls]` and `[http.tls]`, `[[certificate]]`, `[acme]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from tunneld.config.paths import locate
from tunneld.config.values import (
    DAY,
    HOUR,
    MINUTE,
    Count,
    File,
    Seconds,
    Table,
    ValidatedBool,
    VisitorRate,
)
from tunneld.config.wording import literal
from tunneld.errors import ConfigError, UsageError
from tunneld.net.endpoint import parse_host
from tunneld.policy.rates import Rate
from tunneld.tls.contexts import CertificateFiles, server_tls_context

LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
DNS_PORT = 53
SHORT_LIFE = 10 * DAY

LifeFraction = Annotated[float, Field(ge=0.05, le=0.9)]  # more would renew a certificate as soon as it is there

AnyFiles = TypeVar("AnyFiles", bound=CertificateFiles)

_EMAIL = re.compile(r"[^@\s,:]+@[^@\s,:]+\.[^@\s,:]+")
_URL = re.compile(r"https://[^\s/?#]+(/[^\s]*)?")


def _check_files(files: AnyFiles, info: ValidationInfo) -> AnyFiles:
    """Check the files while a configuration is loaded; other code may name files that do not exist yet."""
    if info.context is not None:
        try:
            server_tls_context(files)
        except ConfigError as error:
            raise ValueError("; ".join(error.problems)) from None
    return files


class TlsFiles(Table):
    """`[control.tls]`, `[http.tls]`: the port accepts only TLS."""

    certificate: File
    key: File
    client_ca: File | None = None

    _locate = field_validator("certificate", "key", "client_ca")(locate)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> TlsFiles:
        return _check_files(self, info)


class NamedCertificate(Table):
    """`[[certificate]]`: a certificate for host names, which are read from it. Implements `CertificateFiles`."""

    certificate: File
    key: File

    _locate = field_validator("certificate", "key")(locate)

    @property
    def client_ca(self) -> Path | None:
        """None: visitors need no certificate."""
        return None

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> NamedCertificate:
        return _check_files(self, info)


def _server(value: str) -> str:
    """Check the address of a name server, perhaps with a port."""
    try:
        name_server(value)
    except (UsageError, ValueError):
        raise ValueError(f"{literal(value)} is not HOST or HOST:PORT") from None
    return value


def name_server(text: str) -> tuple[str, int]:
    """Split `HOST`, `HOST:PORT` or `[ADDRESS]:PORT`. Raises `UsageError` or `ValueError`."""
    host, colon, port = text.rpartition(":") if text.count(":") == 1 or "]:" in text else (text, "", "")
    if colon and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise ValueError(f"{port!r} is not a port")
    bare = host.strip("[]")
    return parse_host(f"[{bare}]" if ":" in bare else bare).strip("[]"), int(port or DNS_PORT)


class Rfc2136Settings(Table):
    """`[acme.rfc2136]`: records for dns-01 are written into the zone by a dynamic update, signed with a key (TSIG)."""

    server: Annotated[str, AfterValidator(_server)]
    key_name: str
    key_secret_file: File
    algorithm: Literal["hmac-sha256", "hmac-sha384", "hmac-sha512"] = "hmac-sha256"  # BIND's default for new keys
    timeout: Seconds = 10.0  # an update is one round trip, and one more to the secondaries
    propagation: Seconds = 10.0  # NOTIFY makes secondaries fetch the zone within seconds

    _locate = field_validator("key_secret_file")(locate)


class AcmeSettings(Table):
    """`[acme]`: certificates for host names from an authority such as Let's Encrypt (RFC 8555)."""

    enabled: ValidatedBool = False
    directory: str = LETS_ENCRYPT
    agree: ValidatedBool = False
    contact: str = ""
    profile: str = ""
    ca_file: File | None = None  # None: the authorities of the system verify the directory's HTTPS
    wildcard: bool = True  # one certificate for all names under the domain, if dns-01 is configured
    dns_hook: Annotated[tuple[str, ...], Field(strict=False)] = ()
    dns_hook_timeout: Seconds = 2 * MINUTE  # DNS providers answer in seconds, propagation takes longer
    rfc2136: Rfc2136Settings | None = None
    max_orders: VisitorRate = "20/h"  # a tenth of Let's Encrypt's limit for one account: 300 in three hours
    max_orders_per_owner: VisitorRate = "20/week"  # of one domain Let's Encrypt gives 50 a week, to all owners together
    max_parallel: Count = 4  # a thread each, with about 2 MiB; an order takes seconds
    order_timeout: Seconds = 3 * MINUTE  # validation from several networks, with retries, takes up to a minute
    renew_left: LifeFraction = 0.33  # of 90 days: a month to repair what fails
    renew_left_short: LifeFraction = 0.5  # of 6 days: three days, as long as a weekend
    short_life: Seconds = SHORT_LIFE  # certificates that live shorter are renewed by renew_left_short
    ask_interval: Seconds = 6 * HOUR  # between two questions when to renew (RFC 9773 suggests it)
    retry: Seconds = 5 * MINUTE  # Let's Encrypt permits five failures of a name in an hour
    max_retry: Seconds = DAY  # of a name that has failed for long: its DNS is repaired by people

    _locate = field_validator("ca_file")(locate)

    @field_validator("enabled")
    @classmethod
    def _check_packages(cls, value: bool, info: ValidationInfo) -> bool:
        """Refuse what is not installed while a configuration is loaded."""
        if value and info.context is not None and find_spec("acme") is None:
            raise ValueError("is true, but the Python package acme is not installed; install tunneld[acme]")
        return value

    @field_validator("directory")
    @classmethod
    def _check_directory(cls, value: str) -> str:
        if not _URL.fullmatch(value):
            raise ValueError(f"{literal(value)} is not an https:// URL")
        return value

    @field_validator("agree")
    @classmethod
    def _check_agreement(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("enabled"):
            raise ValueError(
                "is false, but enabled is true; read the terms of service of the authority (Let's Encrypt's are at "
                "https://letsencrypt.org/repository/) and set agree = true to accept them"
            )
        return value

    @field_validator("contact")
    @classmethod
    def _check_contact(cls, value: str) -> str:
        if value and not _EMAIL.fullmatch(value):
            raise ValueError(f"{literal(value)} is not an e-mail address")
        return value

    @field_validator("rfc2136")
    @classmethod
    def _check_dns(cls, value: Rfc2136Settings | None, info: ValidationInfo) -> Rfc2136Settings | None:
        if value is not None and info.data.get("dns_hook"):
            raise ValueError("is set, but dns_hook is, too; use one of them")
        if value is not None and info.context is not None and find_spec("dns") is None:
            raise ValueError("needs the Python package dnspython, which is not installed; install tunneld[dns]")
        return value

    @property
    def proves_dns(self) -> bool:
        """Whether dns-01, and so a wildcard, is possible."""
        return bool(self.dns_hook) or self.rfc2136 is not None

    @property
    def order_rate(self) -> Rate:
        """`max_orders` as a rate."""
        return Rate.parse(self.max_orders)

    @property
    def owner_rate(self) -> Rate:
        """`max_orders_per_owner` as a rate."""
        return Rate.parse(self.max_orders_per_owner)


def acme_settings(values: Mapping[str, object], spell: Callable[[str], str]) -> AcmeSettings:
    """The settings of an agent that obtains certificates itself, from values by key. `spell` turns a key into what the
    user wrote. Raises `UsageError`.
    """
    try:
        return AcmeSettings.model_validate({"enabled": True, "agree": True, "max_retry": HOUR, **values})
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{spell(str(first['loc'][0]))}: {reason}") from None
