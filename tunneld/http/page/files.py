"""The files of the web page, as they are in the package: nothing is built, and nothing is loaded from elsewhere.

The headers confine a browser: only scripts and styles of this relay run, no page embeds this one, and text becomes
markup nowhere (`require-trusted-types-for`).
"""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from tunneld.http.problems import http_error
from tunneld.http.translate import grant_of

PAGE_PREFIX = "/page/"
LOGIN = f"{PAGE_PREFIX}login"
PAGE, LOGIN_PAGE = "index.html", "login.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
}


def is_front(scope: Scope) -> bool:
    """Whether a request is for what everybody may have: the form and how to use it, or the files of the page."""
    path, method = scope["path"], scope["method"]
    if method not in {"GET", "HEAD"}:
        return bool(method == "POST" and path == LOGIN)
    return wants_page(scope) or (path.startswith(PAGE_PREFIX) and path.removeprefix(PAGE_PREFIX) in names())


def wants_page(scope: Scope) -> bool:
    """Whether a request for `/` is a browser's, which wants a page rather than the table of paths."""
    accepted = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return scope["path"] == "/" and scope["method"] in {"GET", "HEAD"} and b"text/html" in accepted


@lru_cache(maxsize=1)
def names() -> dict[str, bytes]:
    """All files by name, without the two pages. Read once: an upgrade comes with a restart."""
    return {name: content for name, content in _all().items() if not name.endswith(".html")}


@lru_cache(maxsize=1)
def _all() -> dict[str, bytes]:
    folder = files("tunneld.http.page") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if _suffix(file.name) in MEDIA_TYPES}


def answer_front(request: Request) -> Response:
    """`/` for a browser: the page, or the form to log in. With `?login` the form in any case: the page asks for it when
    it has lost its half of the session.
    """
    must_log_in = grant_of(request.scope) is None or "login" in request.query_params
    return _respond(request, LOGIN_PAGE if must_log_in else PAGE)


def answer_file(request: Request) -> Response:
    """A script, the style sheet or the icon. Raises `HttpError`."""
    name = request.path_params["name"]
    if name not in names():
        raise http_error(HTTPStatus.NOT_FOUND, f"there is nothing at {request.url.path[:100]!r}")
    return _respond(request, name)


def _respond(request: Request, name: str) -> Response:
    headers = dict(HEADERS)
    if grant_of(request.scope) is None:  # an idle connection without a login would count as an abandoned handshake
        headers["Connection"] = "close"
    return Response(_all()[name], headers=headers, media_type=MEDIA_TYPES[_suffix(name)])


def _suffix(name: str) -> str:
    return name[name.rfind(".") :] if "." in name else ""
