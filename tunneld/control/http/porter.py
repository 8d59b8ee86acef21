"""Who asks: a credential in the Authorization header of each request.

    Authorization: Basic BASE64       of NAME:SECRET in UTF-8 (RFC 7617)
    Authorization: Bearer BASE64      the same (RFC 6750), for programs that know no other

This says the secret to whoever listens, and the face speaks no TLS: it is taken over loopback alone, where a proxy may
stand that does. The proxy must be on this machine; to everybody else the face says no, and never that it would like
to hear a secret. Probes of the process are for everybody.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tunneld.access import EVERYBODY
from tunneld.control.gate import Gate
from tunneld.control.http.problems import Problem, refuse, respond
from tunneld.control.http.words import GRANT, client_of
from tunneld.endpoint import is_loopback
from tunneld.wire.scram import FAILED

OPEN = frozenset({"/healthz", "/readyz"})
CHALLENGE = 'Basic realm="tunneld", charset="UTF-8", Bearer realm="tunneld"'
SCHEMES = frozenset({"basic", "bearer"})


class Porter:
    """ASGI middleware: finds out what a request may do, and turns strangers away."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
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
        host = client_of(scope)
        if not is_loopback(host):
            detail = "credentials are taken over loopback only: put a proxy that speaks TLS on the relay's machine"
            return refuse(HTTPStatus.FORBIDDEN, detail).problem
        headers = Headers(scope=scope).getlist("authorization")
        if not headers:
            detail = "this relay wants a credential: send its name and secret (Authorization: Basic or Bearer)"
            return refuse(HTTPStatus.UNAUTHORIZED, detail, WWW_Authenticate=CHALLENGE).problem
        said = _name_and_secret(headers)
        credential = await self._gate.admit_secret(*said, host) if said else None
        if credential is None:
            self._gate.tell_failure(host, "http", FAILED if said else "not a header of the form Basic or Bearer")
            return refuse(HTTPStatus.UNAUTHORIZED, FAILED, WWW_Authenticate=CHALLENGE).problem
        scope[GRANT] = credential.grant
        return None


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
