"""Authentication middleware: HTTP Basic and Bearer, per request, and client certificates, per connection.

    Authorization: Basic BASE64       of NAME:SECRET in UTF-8 (RFC 7617)
    Authorization: Bearer BASE64      the same (RFC 6750), for programs that support only Bearer

The header holds the secret in clear, so it is accepted over TLS, or over loopback, where a proxy with TLS may stand. On
any other connection the request is refused without asking for a secret. A client certificate that names a credential
needs no header, and neither does the web page, which has a session (page/sessions.py). The health checks, and the form
to log in, need no authentication.
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
from tunneld.auth.preauth import PreauthSlot
from tunneld.errors import LimitReachedError
from tunneld.http.logins import Admitted, check_secret
from tunneld.http.page.page import WebPage
from tunneld.http.problems import HttpError, http_error, respond
from tunneld.http.translate import GRANT, RENEW, client_of
from tunneld.net.endpoint import is_loopback
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.places import Place

PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})
CHALLENGE = 'Basic realm="tunneld", charset="UTF-8", Bearer realm="tunneld"'
SCHEMES = frozenset({"basic", "bearer"})

CLEAR_TEXT = (
    "credentials are accepted only over TLS or over loopback: set [http.tls], use a proxy with TLS on this machine, or "
    "forward the port with ssh (ssh -L 7011:127.0.0.1:7011 RELAY, then http://127.0.0.1:7011/)"
)

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

    def __init__(self, app: ASGIApp, authenticator: Authenticator, page: WebPage | None = None) -> None:
        self._app = app
        self._authenticator = authenticator
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        problem = None
        if self._authenticator.is_open:
            scope[GRANT] = EVERYBODY
        elif scope["path"] in PUBLIC_PATHS:
            connection_info(scope).slot.has_begun = False  # a probe may close the connection now
        else:
            try:
                await self._authenticate(scope)
            except HttpError as error:
                problem = error.problem
        await (self._app if problem is None else respond(scope["path"], problem))(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> None:
        """Store the grant in the scope. Raises `HttpError` if there is none, and the request needs one."""
        host, connection = client_of(scope), connection_info(scope)
        if scope["scheme"] != "https" and not is_loopback(host):
            raise http_error(HTTPStatus.FORBIDDEN, CLEAR_TEXT)
        page = self._page if self._page is not None and self._page.is_enabled else None
        is_front = page is not None and page.is_front(scope)
        headers = Headers(scope=scope).getlist("authorization")
        if headers and not is_front:
            login, malformed = _name_and_secret(headers), "not a header of the form Basic or Bearer"
            credential = await check_secret(self._authenticator, host, login, CHALLENGE, malformed)
            found: Admitted | None = credential, credential.grant
        else:
            found = self._of_certificate(scope) or (page.admitted(scope) if page is not None else None)
        if found is None and is_front:
            connection.slot.has_begun = False  # the form to log in, or a login
            return
        if found is None:
            detail = "this relay requires authentication: send a name and a secret (Authorization: Basic or Bearer)"
            raise http_error(HTTPStatus.UNAUTHORIZED, detail, WWW_Authenticate=CHALLENGE)
        credential, grant = found
        try:
            connection.authenticated(grant)
        except LimitReachedError as error:
            raise http_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error), Connection="close") from None
        self._authenticator.remember_login(host, credential.name)
        scope[GRANT], scope[RENEW] = grant, partial(self._authenticator.renew, credential)

    def _of_certificate(self, scope: Scope) -> Admitted | None:
        certificate = connection_info(scope).certificate
        if certificate is None:
            return None
        credential = self._authenticator.admit_certificate(certificate, client_of(scope))
        return (credential, credential.grant) if credential is not None else None


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
