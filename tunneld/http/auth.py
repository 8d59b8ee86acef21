"""Who asks: a credential in the Authorization header of each request.

    Authorization: Basic BASE64       of NAME:SECRET in UTF-8 (RFC 7617)
    Authorization: Bearer BASE64      the same (RFC 6750), for programs that know no other

This says the secret to whoever listens: it is taken in TLS, or over loopback, where a proxy may stand that speaks it.
To everybody else the face says no, and never that it would like to hear a secret. Who has shown a certificate that
names a credential needs no header. Probes of the process are for everybody.

What is known of a connection before its requests say anything, and where they find it.
"""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthSlot
from tunneld.http.problems import Problem, refuse, respond
from tunneld.http.translate import GRANT, RENEW, client_of
from tunneld.net.endpoint import is_loopback
from tunneld.policy.access import EVERYBODY
from tunneld.wire.scram import FAILED

OPEN = frozenset({"/healthz", "/readyz"})
CHALLENGE = 'Basic realm="tunneld", charset="UTF-8", Bearer realm="tunneld"'
SCHEMES = frozenset({"basic", "bearer"})


class AuthMiddleware:
    """ASGI middleware: finds out what a request may do, and turns strangers away."""

    def __init__(self, app: ASGIApp, gate: Authenticator) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a stranger, pass on everybody else."""
        problem = None
        if self._gate.is_open:
            scope[GRANT] = EVERYBODY
        elif scope["path"] not in OPEN:
            problem = await self._ask(scope)
        await (self._app if problem is None else respond(scope["path"], problem))(scope, receive, send)

    async def _ask(self, scope: Scope) -> Problem | None:
        """Find the grant, or say why there is none."""
        host, guest = client_of(scope), connection_info(scope)
        if scope["scheme"] != "https" and not is_loopback(host):
            detail = "credentials are taken in TLS or over loopback only: add [http.tls], or a proxy on this machine"
            return refuse(HTTPStatus.FORBIDDEN, detail).problem
        headers = Headers(scope=scope).getlist("authorization")
        credential = None
        if not headers and guest.certificate is not None:
            credential = self._gate.admit_certificate(guest.certificate, host)
        if not headers and credential is None:
            detail = "this relay wants a credential: send its name and secret (Authorization: Basic or Bearer)"
            return refuse(HTTPStatus.UNAUTHORIZED, detail, WWW_Authenticate=CHALLENGE).problem
        if headers:
            said = _name_and_secret(headers)
            if self._gate.penalty(host) > 0:
                return self._penalised(host)
            credential = await self._gate.admit_secret(*said, host) if said else None
            if self._gate.penalty(host) > 0:  # many connections at once would be as many guesses
                return self._penalised(host)
            if credential is None:
                reason = FAILED if said else "not a header of the form Basic or Bearer"
                self._gate.log_failure(host, "http", reason, said[0] if said else "")
                return refuse(HTTPStatus.UNAUTHORIZED, FAILED, WWW_Authenticate=CHALLENGE).problem
        assert credential is not None
        guest.stranger.release()
        scope[GRANT], scope[RENEW] = credential.grant, partial(self._gate.renew, credential)
        return None

    def _penalised(self, host: str) -> Problem:
        """Whoever is penalised hears the same whether what they said is right or wrong."""
        seconds = f"{self._gate.penalty(host):.0f}"
        detail = f"too many failures from your address; try again in {seconds} s"
        return refuse(HTTPStatus.TOO_MANY_REQUESTS, detail, Retry_After=seconds, Connection="close").problem


def _name_and_secret(headers: list[str]) -> tuple[str, str] | None:
    """What the header says; None where it says nothing of that kind, or there are two."""
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].strip().partition(" ")
    if scheme.lower() not in SCHEMES:
        return None
    try:
        name, colon, secret = b64decode(token.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return (name, secret) if colon else None


GUEST = "tunneld.guest"
"""The key in the state of an ASGI scope."""


@dataclass(slots=True)
class ConnectionInfo:
    """Who is at the other end: a stranger, until a request of theirs has shown a credential."""

    stranger: PreauthSlot = field(default_factory=PreauthSlot.exempt)
    certificate: bytes | None = None  # in DER, which TLS has verified
    deadline: float = math.inf  # in Trio's time, for the head of the first request


def connection_info(scope: Scope) -> ConnectionInfo:
    """The guest whose request this is."""
    guest: ConnectionInfo = scope.get("state", {}).get(GUEST) or ConnectionInfo()
    return guest
