"""The routes, and what becomes of errors on the way out of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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
from tunneld.control.commands import executor
from tunneld.control.reply import Execute
from tunneld.control.verbs import DaemonControl
from tunneld.errors import TunneldError
from tunneld.http.api import answer_api
from tunneld.http.auth import AuthMiddleware
from tunneld.http.body import read_body
from tunneld.http.metrics import answer_metrics, new_registry
from tunneld.http.origin import SERVLET, OriginMiddleware
from tunneld.http.problems import HttpError, Problem, of_error, respond
from tunneld.http.responses import ResponseMiddleware
from tunneld.http.rpc import answer_call
from tunneld.http.servlet import answer_servlet
from tunneld.http.translate import grant_of
from tunneld.policy.access import Role, check_role

Answer = Callable[[Request, bytes, Execute], Awaitable[ASGIApp]]

INDEX = f"""\
POST      /RPC2  /                    XML-RPC: tunnel.openTunnel, tunnel.getTunnelAddress, system.listMethods
GET POST  {SERVLET}    ?method=openTunnel, ?method=getTunnelAddress&uri=URI
GET POST  /api/v1/VERB                JSON; GET /api/v1 lists the verbs
GET       /healthz  /readyz  /metrics
"""
"""What `GET /` says."""


@dataclass(frozen=True, slots=True)
class HttpApp:
    """The endpoints, and what they share."""

    daemon: DaemonControl
    execute: Execute
    registry: CollectorRegistry

    def bodied(self, answer: Answer) -> Callable[[Request], Awaitable[ASGIApp]]:
        """An endpoint that reads the body first."""

        async def endpoint(request: Request) -> ASGIApp:
            settings = self.daemon.settings.http
            body = await read_body(request, settings.max_body, settings.read_timeout)
            return await answer(request, body, self.execute)

        return endpoint

    async def root(self, request: Request) -> ASGIApp:
        """XML-RPC for programs, the table of routes for people."""
        if request.method == "POST":
            return await self.bodied(answer_call)(request)
        return PlainTextResponse(INDEX)

    async def healthz(self, _request: Request) -> Response:
        """Whether the process is alive: it answers."""
        return PlainTextResponse("ok\n")

    async def readyz(self, _request: Request) -> Response:
        """Whether the daemon takes new tunnels."""
        if self.daemon.service.draining:
            return PlainTextResponse("draining\n", HTTPStatus.SERVICE_UNAVAILABLE)
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        """For Prometheus, which needs the role admin: they tell of everybody's tunnels."""
        check_role(grant_of(request.scope), Role.ADMIN, "/metrics")
        return answer_metrics(self.registry)


def new_app(daemon: DaemonControl, gate: Authenticator) -> ASGIApp:
    """The ASGI application."""
    faces = HttpApp(daemon, executor(daemon), new_registry(daemon, gate.preauth))
    api, looking_and_doing = faces.bodied(answer_api), ["GET", "POST"]
    app = Starlette(
        routes=[
            Route("/", faces.root, methods=looking_and_doing),
            Route("/RPC2", faces.bodied(answer_call), methods=["POST"]),
            Route(SERVLET, faces.bodied(answer_servlet), methods=looking_and_doing),
            Route("/api/v1", api, methods=["GET"]),
            Route("/api/v1/", api, methods=["GET"]),
            Route("/api/v1/{verb}", api, methods=looking_and_doing),
            Route("/healthz", faces.healthz),
            Route("/readyz", faces.readyz),
            Route("/metrics", faces.metrics),
        ],
        middleware=[
            Middleware(ResponseMiddleware),
            Middleware(OriginMiddleware, settings=lambda: daemon.settings.http),
            Middleware(AuthMiddleware, gate=gate),
        ],
        exception_handlers={HTTPException: _off_route, HttpError: _refused, TunneldError: _failed},
    )
    app.router.redirect_slashes = False
    return app


def _off_route(request: Request, error: Exception) -> Response:
    """No such path, or not by this method: what Starlette's router has to say."""
    assert isinstance(error, HTTPException)
    path, status = request.url.path, HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(headers.get("Allow", "").split(", ")))
        detail = f"{path[:100]} does not take {request.method}, only {headers['Allow']}"
    else:
        detail = f"nothing is at {path[:100]!r}; GET / says what there is"
    return respond(path, Problem(status, detail, headers=headers))


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return respond(request.url.path, error.problem)


def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, TunneldError)
    return respond(request.url.path, of_error(error))
