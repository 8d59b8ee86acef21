"""The web page as one object: its sessions, its feeds and its routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from tunneld.auth.authenticator import Authenticator
from tunneld.config.http import PageSettings
from tunneld.directory.reply import Execute
from tunneld.errors import UsageError
from tunneld.http.logins import Admitted, check_secret
from tunneld.http.page.files import LOGIN, answer_file, is_front
from tunneld.http.page.login import (
    LOGIN_AGAIN,
    SESSION_CHALLENGE,
    answer_login,
    answer_logout,
    front_session_of,
    parse_login,
    session_of,
    token_of,
)
from tunneld.http.page.sessions import PageSessions
from tunneld.http.page.stream import PageFeeds, PageStream, viewer_of
from tunneld.http.problems import http_error
from tunneld.http.translate import RENEW, client_of, grant_of
from tunneld.policy.access import Grant

Answer = Callable[[Request, bytes, Execute], Awaitable[ASGIApp]]
WithBody = Callable[[Answer], Callable[[Request], Awaitable[ASGIApp]]]


class WebPage:
    """The page of one relay."""

    def __init__(self, authenticator: Authenticator, execute: Execute, settings: Callable[[], PageSettings]) -> None:
        """`settings` is called at each use."""
        self.sessions = PageSessions(settings, trio.current_time)
        self._authenticator = authenticator
        self._settings = settings
        self._feeds = PageFeeds(execute, settings)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the feeds until cancelled."""
        await self._feeds.run(task_status=task_status)

    @property
    def is_enabled(self) -> bool:
        """Whether there is a page."""
        return self._settings().enabled

    def routes(self, with_body: WithBody) -> list[Route]:
        """The routes below `/page/`; `with_body` makes an endpoint that reads the body."""
        return [
            Route(LOGIN, with_body(self._log_in), methods=["POST"]),
            Route("/page/logout", with_body(self._log_out), methods=["POST"]),
            Route("/page/stream", self._stream),
            Route("/page/{name}", self._file),
        ]

    # Who sends a request

    def is_front(self, scope: Scope) -> bool:
        """Whether a request needs no authentication: it is for the form to log in, or for a file."""
        return self.is_enabled and is_front(scope)

    def admitted(self, scope: Scope) -> Admitted | None:
        """The credential of the session of a request, and what it may do now; None if the request has no session.
        Raises `HttpError` if the page has one that is over.
        """
        if not self.is_enabled or not (self.is_front(scope) or token_of(scope) is not None):
            return None
        session = front_session_of(scope, self.sessions) if self.is_front(scope) else session_of(scope, self.sessions)
        grant = self._authenticator.renew(session.credential) if session is not None else None
        if session is not None and grant is not None and grant.admits(client_of(scope)):
            return session.credential, grant
        if self.is_front(scope):
            return None
        raise http_error(HTTPStatus.UNAUTHORIZED, LOGIN_AGAIN, WWW_Authenticate=SESSION_CHALLENGE)

    # Endpoints

    async def _log_in(self, request: Request, body: bytes, _execute: Execute) -> Response:
        self._check_enabled()
        if self._authenticator.is_open:
            raise UsageError("this relay has no credentials, so there is nothing to log in to")
        login = parse_login(body)
        credential = await check_secret(self._authenticator, client_of(request.scope), login, SESSION_CHALLENGE)
        self._authenticator.remember_login(client_of(request.scope), credential.name)
        return answer_login(request, self.sessions, credential, self._settings().session_timeout)

    async def _log_out(self, request: Request, _body: bytes, _execute: Execute) -> Response:
        self._check_enabled()
        return answer_logout(request, self.sessions)

    async def _file(self, request: Request) -> Response:
        self._check_enabled()
        return answer_file(request)

    async def _stream(self, request: Request) -> PageStream:
        self._check_enabled()
        scope, grant = request.scope, grant_of(request.scope)
        assert grant is not None
        has_session = session_of(scope, self.sessions) is not None
        renew: Callable[[], Grant | None] = scope.get(RENEW) or (lambda: grant)

        def still() -> Grant | None:
            """The grant now; it also tells the session that it is in use."""
            return renew() if not has_session or session_of(scope, self.sessions) is not None else None

        return PageStream(self._feeds, viewer_of(request, grant, still, has_session=has_session))

    def _check_enabled(self) -> None:
        if not self.is_enabled:
            raise http_error(HTTPStatus.NOT_FOUND, "the page is disabled (http.page.enabled)")
