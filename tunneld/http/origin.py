"""Refuses requests that a page of another site could make a browser send (cross-site request forgery, DNS rebinding).

The relay listens on loopback, and without credentials any program on the machine may open tunnels. A web page in a
browser on that machine could send requests through the browser; with credentials, the browser may store one and add it
by itself. Five checks prevent this:

- *Host.* For the browser, a page with a name that points at 127.0.0.1 (DNS rebinding) has the same origin as the relay,
  but its requests still carry its name. Only the names of loopback, our own address, the configured host and
  `http.allowed_hosts` are accepted. A request without Host is HTTP/1.0 and not from a browser.
- *Origin, Sec-Fetch-Site, and Referer if both are missing.* With these, browsers say where a request comes from, and
  pages cannot change them. A request that changes something must come from a page of the relay or from no page at all.
  Another port of the same host is foreign: it may be a tunnel, with pages written by the owner of the hidden server.
- *Content type.* XML and JSON cannot be sent across sites without a CORS preflight, which we never allow.
- *The servlet* changes something with a plain GET, which an image on any page can send, with `no-referrer`, and to an
  address outside loopback even without Sec-Fetch-Site. There, a browser that sends none of these headers is refused;
  all browsers call themselves Mozilla.
- *Sec-Fetch-Mode.* The servlet refuses every navigation. A page can redirect a browser to it, and if the navigation
  began in the address bar, the redirected request still says `Sec-Fetch-Site: none`. No program sends this header.

`refusal` decides and is pure; `OriginMiddleware` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tunneld.config.http import HttpSettings
from tunneld.errors import UsageError
from tunneld.http.page.files import PAGE_PREFIX
from tunneld.http.problems import API_PREFIX, Problem, http_error, respond
from tunneld.http.translate import server_of
from tunneld.net.endpoint import is_loopback, is_wildcard, parse_host

SERVLET = "/tristero/servlet/tunnel"
XML_TYPES = frozenset({"text/xml", "application/xml"})
JSON_TYPES = frozenset({"application/json"})
FORM_TYPES = frozenset({"", "application/x-www-form-urlencoded"})
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True, slots=True)
class Head:
    """The parts of a request that matter here. An absent header is empty, repeated ones are joined with commas."""

    method: str
    path: str
    server: str  # our own address on this connection
    host: str = ""
    origin: str = ""
    site: str = ""
    mode: str = ""  # Sec-Fetch-Mode
    referer: str = ""
    agent: str = ""
    content_type: str = ""

    @classmethod
    def of(cls, scope: Scope) -> Head:
        """Read it from an ASGI scope."""
        headers = Headers(scope=scope)

        def every(name: str) -> str:
            return ", ".join(headers.getlist(name)).strip()

        return cls(
            method=scope["method"],
            path=scope["path"],
            server=server_of(scope),
            host=every("host").lower(),
            origin=every("origin").lower(),
            site=every("sec-fetch-site").lower(),
            mode=every("sec-fetch-mode").lower(),
            referer=every("referer"),
            agent=every("user-agent"),
            content_type=every("content-type").partition(";")[0].strip().lower(),
        )

    @property
    def changes(self) -> bool:
        """Whether the request can change anything."""
        return self.path == SERVLET or self.method not in {"GET", "HEAD"}


class OriginMiddleware:
    """ASGI middleware: answers a request that `refusal` refuses. `settings` is called for each request."""

    def __init__(self, app: ASGIApp, settings: Callable[[], HttpSettings]) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        problem = refusal(Head.of(scope), self._settings())
        await (self._app if problem is None else respond(scope["path"], problem))(scope, receive, send)


def refusal(head: Head, settings: HttpSettings) -> Problem | None:
    """Why a request is refused, or None."""
    if head.host and not _is_own_host(head, settings):
        detail = f"{head.host[:100]!r} is not a name of this relay; if it should be, add it to http.allowed_hosts"
        return http_error(HTTPStatus.MISDIRECTED_REQUEST, detail).problem
    if head.changes and (source := _foreign_source(head)):
        detail = f"this request comes from {source}; only programs and pages of this relay may change anything here"
        return http_error(HTTPStatus.FORBIDDEN, detail).problem
    return _wrong_type(head)


def _is_own_host(head: Head, settings: HttpSettings) -> bool:
    name = _host_of(head.host)
    configured = set() if is_wildcard(settings.host) else {settings.host}
    return name is not None and (is_loopback(name) or name in {head.server, *configured, *settings.allowed_hosts})


def _host_of(authority: str) -> str | None:
    """The host in `host[:port]`, or None if it is malformed."""
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, "0"
    try:
        return parse_host(host.removesuffix(".")) if port.isdecimal() else None
    except UsageError:
        return None


def _foreign_source(head: Head) -> str:
    """A description of the foreign page or site that a request comes from; empty if it comes from none."""
    if head.path == SERVLET and "navigate" in head.mode:
        return "the address bar, a link or a redirect of a browser"
    if head.origin and not _is_own_page(head.origin, head.host):
        return f"the origin {head.origin[:100]!r}"
    if head.site and head.site not in {"same-origin", "none"}:
        return f"another site (Sec-Fetch-Site: {head.site[:20]!r})"
    if head.origin or head.site:
        return ""
    if head.referer and not _is_own_page(head.referer, head.host):
        return f"the page {head.referer[:100]!r}"
    if head.path == SERVLET and not head.referer and head.agent.startswith("Mozilla/"):
        return "a browser, which does not say from which page"
    return ""


def _is_own_page(url: str, host: str) -> bool:
    """Whether a URL or an origin has the same host and port as the request."""
    try:
        parts = urlsplit(url.lower())
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    return bool(host) and default is not None and parts.netloc.removesuffix(default) == host.removesuffix(default)


def _wrong_type(head: Head) -> Problem | None:
    if head.method != "POST":
        return None
    prefixes = {SERVLET: FORM_TYPES, API_PREFIX: JSON_TYPES, PAGE_PREFIX: JSON_TYPES}
    expected = next((types for prefix, types in prefixes.items() if head.path.startswith(prefix)), XML_TYPES)
    if head.content_type in expected:
        return None
    wanted = " or ".join(sorted(filter(None, expected)))
    detail = f"the content type is {head.content_type[:100] or 'missing'}; send {wanted}"
    return http_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail).problem
