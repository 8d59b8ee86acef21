"""The ASGI application: routes, and the responses to errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tunneld.auth.authenticator import Authenticator
from tunneld.control.verbs import DaemonControl
from tunneld.directory.reply import Execute
from tunneld.errors import TunneldError
from tunneld.http.api import answer_api
from tunneld.http.auth import AuthMiddleware
from tunneld.http.body import read_body
from tunneld.http.metrics import answer_metrics, new_registry
from tunneld.http.origin import SERVLET, OriginMiddleware
from tunneld.http.page.files import answer_front, wants_page
from tunneld.http.page.page import WebPage
from tunneld.http.problems import HttpError, Problem, problem_of, respond
from tunneld.http.responses import ResponseMiddleware
from tunneld.http.rpc import answer_call
from tunneld.http.servlet import answer_servlet
from tunneld.http.translate import caller_of, grant_of
from tunneld.policy.access import Role, check_role

AnswerFunction = Callable[[Request, bytes, Execute], Awaitable[ASGIApp]]

INDEX_PAGE = f"""\
POST      /RPC2  /                    XML-RPC: tunnel.openTunnel, tunnel.getTunnelAddress, system.listMethods
GET POST  {SERVLET}    ?method=openTunnel, ?method=getTunnelAddress&uri=URI
GET POST  /api/v1/VERB                JSON; GET /api/v1 lists the verbs
GET       /  in a browser             the web page
GET       /healthz  /readyz  /metrics
"""
"""The body of `GET /` for a program."""


@dataclass(frozen=True, slots=True)
class HttpApp:
    """The endpoints, and what they share."""

    daemon: DaemonControl
    execute: Execute
    registry: CollectorRegistry
    page: WebPage

    def with_body(self, answer: AnswerFunction) -> Callable[[Request], Awaitable[ASGIApp]]:
        """An endpoint that reads the body and passes it to `answer`."""

        async def endpoint(request: Request) -> ASGIApp:
            settings = self.daemon.settings.http
            body = await read_body(request, settings.max_body, settings.read_timeout)
            return await answer(request, body, self.execute)

        return endpoint

    async def root(self, request: Request) -> ASGIApp:
        """`/`: XML-RPC for POST; for GET the page, or the table of routes for a program."""
        if request.method == "POST":
            return await self.with_body(answer_call)(request)
        if self.page.is_enabled and wants_page(request.scope):
            return answer_front(request)
        return PlainTextResponse(INDEX_PAGE)

    async def healthz(self, _request: Request) -> Response:
        """`/healthz`: the process is alive, since it answers."""
        return PlainTextResponse("ok\n")

    async def readyz(self, _request: Request) -> Response:
        """`/readyz`: whether the daemon accepts new tunnels."""
        if self.daemon.service.draining:
            return PlainTextResponse("draining\n", HTTPStatus.SERVICE_UNAVAILABLE)
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        """`/metrics`: requires the role viewer or admin, because the metrics cover the tunnels of all credentials."""
        check_role(grant_of(request.scope), Role.ADMIN, "/metrics", changes=False)
        step = partial(self.daemon.service.turns.step, caller_of(request.scope))
        return await answer_metrics(self.registry, self.daemon, step)


def new_app(daemon: DaemonControl, authenticator: Authenticator, page: WebPage, execute: Execute) -> ASGIApp:
    """The ASGI application with its middleware, outermost first."""
    endpoints = HttpApp(daemon, execute, new_registry(daemon, authenticator.preauth), page)
    api, get_and_post = endpoints.with_body(answer_api), ["GET", "POST"]
    app = Starlette(
        routes=[
            Route("/", endpoints.root, methods=get_and_post),
            Route("/RPC2", endpoints.with_body(answer_call), methods=["POST"]),
            Route(SERVLET, endpoints.with_body(answer_servlet), methods=get_and_post),
            Route("/api/v1", api, methods=["GET"]),
            Route("/api/v1/", api, methods=["GET"]),
            Route("/api/v1/{verb}", api, methods=get_and_post),
            Route("/healthz", endpoints.healthz),
            Route("/readyz", endpoints.readyz),
            Route("/metrics", endpoints.metrics),
            *page.routes(endpoints.with_body),
        ],
        middleware=[
            Middleware(ResponseMiddleware),
            Middleware(OriginMiddleware, settings=lambda: daemon.settings.http),
            Middleware(AuthMiddleware, authenticator=authenticator, page=page),
        ],
        exception_handlers={
            HTTPException: _answer_no_route,
            HttpError: _answer_http_error,
            TunneldError: _answer_error,
        },
    )
    app.router.redirect_slashes = False
    return app


def _answer_no_route(request: Request, error: Exception) -> Response:
    """The response to an unknown path or a method that the path does not support; Starlette's router raised it."""
    assert isinstance(error, HTTPException)
    path, status = request.url.path, HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(headers.get("Allow", "").split(", ")))
        detail = f"{path[:100]} does not support {request.method}, only {headers['Allow']}"
    else:
        detail = f"there is nothing at {path[:100]!r}; GET / lists the paths"
    return respond(path, Problem(status, detail, headers=headers))


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return respond(request.url.path, error.problem)


def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TunneldError)
    return respond(request.url.path, problem_of(error))
