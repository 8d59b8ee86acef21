"""What a tunnel with host names may ask of its visitors: the options `auth`, `forward_auth` and `hsts`. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunneld.errors import NotAllowedError, UsageError
from tunneld.wire.http_fields import HOP_BY_HOP

if TYPE_CHECKING:
    from tunneld.policy.options import TunnelOptions

MAX_HSTS = 2 * 365 * 24 * 3600
"""Seconds: two years, as the list of sites that browsers ship recommends."""

MAX_FORWARD_AUTH_FIELDS = 16
"""Names in `forward_auth_fields`."""

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253})(:(?P<port>[0-9]{1,5}))?(?P<target>/[!-~]*)?"
)
_FIELD = re.compile(r"[A-Za-z0-9!#$%&'*+.^`|~-]{1,64}")
_UNTOUCHABLE = HOP_BY_HOP | {b"host", b"content-length", b"content-type", b"trailer", b"expect", b"cookie"}


@dataclass(frozen=True, slots=True)
class AuthUrl:
    """Where an authentication server is asked."""

    secure: bool
    host: str
    port: int
    authority: bytes
    target: bytes

    @classmethod
    def parse(cls, text: str) -> AuthUrl:
        """Read `https://HOST[:PORT][/PATH]`. Raises `UsageError`."""
        match = _URL.fullmatch(text)
        secure = match is not None and match["scheme"] == "https"
        port = int(match["port"] or (443 if secure else 80)) if match else 0
        if match is None or not 0 < port < 65536 or "#" in (match["target"] or ""):
            raise UsageError(f"{text!r} is not a URL such as https://auth.example.org/verify")
        authority = match["host"] + (f":{match['port']}" if match["port"] else "")
        return cls(secure, match["host"].strip("[]"), port, authority.encode(), (match["target"] or "/").encode())


def parse_field_names(text: str) -> tuple[str, ...]:
    """Read the value of `forward_auth_fields`. Raises `ValueError`."""
    names = tuple(text.split(","))
    if len(names) > MAX_FORWARD_AUTH_FIELDS:
        raise ValueError(f"more than {MAX_FORWARD_AUTH_FIELDS} fields")
    for name in names:
        if not _FIELD.fullmatch(name) or name.lower().encode() in _UNTOUCHABLE:
            raise ValueError(f"{name!r} is not a field that an authentication server may set")
    return names


def check_site_options(options: TunnelOptions, forward_auth: Collection[str]) -> None:
    """Raise `UsageError` where options of host names contradict each other or others, or `NotAllowedError` where the
    relay's operator has not allowed its URL. `forward_auth` are the URLs that are allowed.
    """
    if options.tls == "pass":
        _check_pass(options)
    given = [key for key in ("auth", "forward_auth", "hsts") if getattr(options, key)]
    if not given:
        return
    if not options.host:
        raise UsageError(f"option {given[0]} is for host names; add host, or use allow_from for a port")
    if options.auth and options.forward_auth:
        raise UsageError("options auth and forward_auth exclude each other")
    if given != ["hsts"] and options.client_port is not None:
        raise UsageError(f"option {given[0]} would not protect the port {options.client_port}; leave out client_port")
    if options.forward_auth_fields and not options.forward_auth:
        raise UsageError("option forward_auth_fields requires forward_auth")
    if options.forward_auth and options.forward_auth not in forward_auth:
        raise NotAllowedError(
            f"this relay may not ask {options.forward_auth}; its operator can add the URL to names.forward_auth"
        )


def _check_pass(options: TunnelOptions) -> None:
    """The relay reads the name in the first message of a visitor, and nothing else."""
    if not options.host:
        raise UsageError("option tls=pass is for host names; add host, or leave it out for a port, which passes TLS on")
    if any("/" in name for name in options.host):
        raise UsageError(
            "option tls=pass excludes paths, which the relay cannot see in TLS; leave out the path in host"
        )
    if options.plain_http == "allow":
        raise UsageError("option plain_http=allow requires that TLS ends at the relay; leave out tls=pass")
    for key in ("auth", "forward_auth", "host_header", "hsts"):
        if getattr(options, key):
            raise UsageError(f"option {key} requires that TLS ends at the relay; leave out tls=pass")
