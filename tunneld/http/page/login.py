"""Logging in and out of the web page.

    POST /page/login   {"name": NAME, "secret": SECRET}    {"token": ...} and a cookie

The same checks and penalties apply as to an Authorization header; see `http.auth`.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from tunneld.config.credentials import Credential
from tunneld.errors import UsageError
from tunneld.http.page.sessions import PageSession, PageSessions

TOKEN_HEADER = "x-tunneld-token"
SESSION_CHALLENGE = 'Session realm="tunneld"'
"""The challenge to a page whose session is over: a scheme that no browser asks its user for."""
LOGIN_AGAIN = "the session has ended; log in again"


def parse_login(body: bytes) -> tuple[str, str]:
    """The name and the secret in the body of a login. Raises `UsageError`."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = None
    match parsed:
        case {"name": str(name), "secret": str(secret)} if len(parsed) == 2:
            return name, secret
    raise UsageError('the body is not of the form {"name": "...", "secret": "..."}')


def answer_login(request: Request, sessions: PageSessions, credential: Credential, timeout: float) -> Response:
    """Begin a session. `timeout` is the time in seconds after which it ends in any case."""
    cookie, token = sessions.begin(credential)
    response = JSONResponse({"token": token, "name": credential.name, "role": credential.role})
    response.set_cookie(
        cookie_name(request.scope),
        cookie,
        max_age=int(timeout),
        secure=request.scope["scheme"] == "https",
        httponly=True,
        samesite="strict",
    )
    return response


def answer_logout(request: Request, sessions: PageSessions) -> Response:
    """End the session of a request."""
    sessions.end(_cookie_of(request.scope))
    response = Response(status_code=HTTPStatus.NO_CONTENT)
    secure = request.scope["scheme"] == "https"
    response.delete_cookie(cookie_name(request.scope), secure=secure, httponly=True, samesite="strict")
    return response


def session_of(scope: Scope, sessions: PageSessions) -> PageSession | None:
    """The session of a request that has its cookie and its token."""
    return sessions.find(_cookie_of(scope), token_of(scope) or "")


def front_session_of(scope: Scope, sessions: PageSessions) -> PageSession | None:
    """The session of a request that has its cookie: enough to get the page, which has nothing secret in it."""
    return sessions.find(_cookie_of(scope))


def token_of(scope: Scope) -> str | None:
    """The token in the header of a request; None if it has none."""
    return Headers(scope=scope).get(TOKEN_HEADER)


def cookie_name(scope: Scope) -> str:
    """The name of the cookie. Browsers do not tell the ports of a host apart, so it has the port: an operator may reach
    several relays through tunnels of ssh. With TLS its prefix says that no other host of the domain may set it.
    """
    _host, _, port = Headers(scope=scope).get("host", "").rpartition(":")
    return ("__Host-" if scope["scheme"] == "https" else "") + f"tunneld-{port if port.isdecimal() else 'page'}"


def _cookie_of(scope: Scope) -> str:
    return cookie_parser(Headers(scope=scope).get("cookie", "")).get(cookie_name(scope), "")
