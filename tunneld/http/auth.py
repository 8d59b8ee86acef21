"""Authentication middleware: HTTP Basic and Bearer, per request, and client certificates, per connection.

    Authorization: Basic BASE64       of NAME:SECRET in UTF-8 (RFC 7617)
    Authorization: Bearer BASE64      the same (RFC 6750), for programs that support only Bearer

The header holds the secret in clear, so it is accepted over TLS, or over loopback, where a proxy with TLS may stand. On
any other connection the request is refused without asking for a secret. A client certificate that names a credential
needs no header. The health checks need no authentication.
"""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

import trio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tunneld.auth.authenticator import Authenticator
from tunneld.auth.penalties import Block
from tunneld.auth.preauth import PreauthSlot
from tunneld.errors import LimitReachedError
from tunneld.http.problems import Problem, http_error, respond
from tunneld.http.translate import GRANT, RENEW, client_of
from tunneld.net.endpoint import is_loopback
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.places import Place
from tunneld.wire.scram import FAILED

PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})
CHALLENGE = 'Basic realm="tunneld", charset="UTF-8", Bearer realm="tunneld"'
SCHEMES = frozenset({"basic", "bearer"})

CONNECTION_INFO = "tunneld.connection"
"""The key of the `ConnectionInfo` in the state of an ASGI scope."""


@dataclass(slots=True)
class ConnectionInfo:
    """What is known of a connection beside its requests. The server makes it; requests find it in their scope."""

    slot: PreauthSlot = field(default_factory=PreauthSlot.exempt)  # held until a request has authenticated
    certificate: bytes | None = None  # the client certificate (DER), which TLS has verified
    place: Place = field(default_factory=Place)  # claimed for the credential of the latest request
    deadline: float = math.inf  # of Trio's clock: until then a request must have authenticated, see `authenticated`

    def authenticated(self, grant: Grant) -> None:
        """A request has authenticated, or none needs to: the connection has a place of this credential, and leaves the
        limits for unauthenticated ones. Raises `LimitReachedError` if there is no place.
        """
        self.slot.has_begun = False  # whatever follows, the peer has done what it must
        self.place.claim(grant)
        self.slot.release()
        self.deadline = math.inf

    def head_deadline(self, timeout: float) -> float:
        """The time by which the head of the next request must have arrived, which has `timeout` seconds."""
        return min(trio.current_time() + timeout, self.deadline)


def connection_info(scope: Scope) -> ConnectionInfo:
    """The connection on which a request came in."""
    info: ConnectionInfo = scope.get("state", {}).get(CONNECTION_INFO) or ConnectionInfo()
    return info


class AuthMiddleware:
    """ASGI middleware: stores the grant of a request in its scope, or answers the request with an error."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        problem = None
        if self._authenticator.is_open:
            scope[GRANT] = EVERYBODY
        elif scope["path"] in PUBLIC_PATHS:
            connection_info(scope).slot.has_begun = False  # a probe may close the connection now
        else:
            problem = await self._authenticate(scope)
        await (self._app if problem is None else respond(scope["path"], problem))(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> Problem | None:
        """Store the grant in the scope and return None, or return why there is none."""
        host, connection = client_of(scope), connection_info(scope)
        if scope["scheme"] != "https" and not is_loopback(host):
            detail = (
                "credentials are accepted only over TLS or over loopback: set [http.tls], or use a proxy with TLS on "
                "this machine"
            )
            return http_error(HTTPStatus.FORBIDDEN, detail).problem
        headers = Headers(scope=scope).getlist("authorization")
        credential = None
        if not headers and connection.certificate is not None:
            credential = self._authenticator.admit_certificate(connection.certificate, host)
        if not headers and credential is None:
            detail = "this relay requires authentication: send a name and a secret (Authorization: Basic or Bearer)"
            return http_error(HTTPStatus.UNAUTHORIZED, detail, WWW_Authenticate=CHALLENGE).problem
        if headers:
            login = _name_and_secret(headers)
            name = login[0] if login else ""
            if (block := self._authenticator.block(host, name)) is not None:
                return _refuse_blocked(block)
            credential = await self._authenticator.admit_secret(*login, host) if login else None
            if (block := self._authenticator.block(host, name)) is not None:  # else parallel connections allow guesses
                return _refuse_blocked(block)
            if credential is None:
                reason = FAILED if login else "not a header of the form Basic or Bearer"
                self._authenticator.log_failure(host, "http", reason, name)
                return http_error(HTTPStatus.UNAUTHORIZED, FAILED, WWW_Authenticate=CHALLENGE).problem
        assert credential is not None
        try:
            connection.authenticated(credential.grant)
        except LimitReachedError as error:
            return http_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error), Connection="close").problem
        self._authenticator.remember_login(host, credential.name)
        scope[GRANT], scope[RENEW] = credential.grant, partial(self._authenticator.renew, credential)
        return None


def _refuse_blocked(block: Block) -> Problem:
    """The answer to a name or an address with a penalty: the same whether the secret is correct or not."""
    seconds = f"{max(1, round(block.seconds))}"
    return http_error(HTTPStatus.TOO_MANY_REQUESTS, block.reason, Retry_After=seconds, Connection="close").problem


def _name_and_secret(headers: list[str]) -> tuple[str, str] | None:
    """The name and secret in the Authorization header; None if it is malformed or there is more than one."""
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
