"""What a browser may not do for a page that is not ours.

The relay listens on loopback, and without credentials whoever is on the machine may open tunnels. A web page that a
person on it looks at runs there, too, and could use their browser as its hands; with credentials that browser may hold
one and add it by itself. Four things stop it:

- *Host.* A page whose own name was made to point at 127.0.0.1 (DNS rebinding) is of the same origin as what it calls,
  but its requests still carry its name. Only loopback's names, our own address, the configured one and
  `http.allowed_hosts` are ours. A request without Host is of HTTP/1.0 and of no browser.
- *Origin, Sec-Fetch-Site, and Referer where both are missing.* Browsers say with these where a request comes from,
  and pages cannot change them. What changes anything must come from here or from no page at all. Another port of the
  same host is foreign: it may be a tunnel, and whoever exposes a server through it writes its pages.
- *Content type.* XML and JSON cannot be sent across sites without asking first (a CORS preflight), and we never
  consent.
- *The servlet* changes things with a plain GET, which an image on any page can send, with `no-referrer`, and to an
  address that is not loopback's even without Sec-Fetch-Site. A browser that says nothing is turned away there; all
  browsers call themselves Mozilla.

`refusal` decides and is pure; `OriginMiddleware` asks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tunneld.config.schema import HttpSettings
from tunneld.errors import UsageError
from tunneld.http.problems import API_PREFIX, Problem, refuse, respond
from tunneld.http.translate import server_of
from tunneld.net.endpoint import is_loopback, is_wildcard, parse_host

SERVLET = "/tristero/servlet/tunnel"
XML_TYPES = frozenset({"text/xml", "application/xml"})
JSON_TYPES = frozenset({"application/json"})
FORM_TYPES = frozenset({"", "application/x-www-form-urlencoded"})
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True, slots=True)
class Head:
    """The parts of a request's head by which it is judged; an absent header is empty, a repeated one has commas."""

    method: str
    path: str
    server: str  # our address on this connection
    host: str = ""
    origin: str = ""
    site: str = ""
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
            referer=every("referer"),
            agent=every("user-agent"),
            content_type=every("content-type").partition(";")[0].strip().lower(),
        )

    @property
    def changes(self) -> bool:
        """Whether the request can change anything."""
        return self.path == SERVLET or self.method not in {"GET", "HEAD"}


class OriginMiddleware:
    """ASGI middleware: asks `refusal`, with the settings in force at that moment."""

    def __init__(self, app: ASGIApp, settings: Callable[[], HttpSettings]) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, pass on every other."""
        problem = refusal(Head.of(scope), self._settings())
        await (self._app if problem is None else respond(scope["path"], problem))(scope, receive, send)


def refusal(head: Head, settings: HttpSettings) -> Problem | None:
    """Why a request is turned away, or None."""
    if head.host and not _is_ours(head, settings):
        detail = f"{head.host[:100]!r} is not a name of this relay; if it should be one, add it to http.allowed_hosts"
        return refuse(HTTPStatus.MISDIRECTED_REQUEST, detail).problem
    if head.changes and (stranger := _stranger(head)):
        detail = f"this request comes from {stranger}; only pages of this relay, and programs, may change anything here"
        return refuse(HTTPStatus.FORBIDDEN, detail).problem
    return _wrong_type(head)


def _is_ours(head: Head, settings: HttpSettings) -> bool:
    name = _host_of(head.host)
    configured = set() if is_wildcard(settings.host) else {settings.host}
    return name is not None and (is_loopback(name) or name in {head.server, *configured, *settings.allowed_hosts})


def _host_of(authority: str) -> str | None:
    """The host in `host[:port]`, or None where it is none."""
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, "0"
    try:
        return parse_host(host.removesuffix(".")) if port.isdecimal() else None
    except UsageError:
        return None


def _stranger(head: Head) -> str:
    """Where a request comes from that does not come from us, in words, or nothing."""
    if head.origin and not _is_own_page(head.origin, head.host):
        return f"the origin {head.origin[:100]!r}"
    if head.site and head.site not in {"same-origin", "none"}:
        return f"another site (Sec-Fetch-Site: {head.site[:20]!r})"
    if head.origin or head.site:
        return ""
    if head.referer and not _is_own_page(head.referer, head.host):
        return f"the page {head.referer[:100]!r}"
    if head.path == SERVLET and not head.referer and head.agent.startswith("Mozilla/"):
        return "a browser that does not say which page sent it"
    return ""


def _is_own_page(url: str, host: str) -> bool:
    """Whether a URL or an origin has the authority that the request was sent to, port and all."""
    try:
        parts = urlsplit(url.lower())
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    return bool(host) and default is not None and parts.netloc.removesuffix(default) == host.removesuffix(default)


def _wrong_type(head: Head) -> Problem | None:
    if head.method != "POST":
        return None
    prefixes = {SERVLET: FORM_TYPES, API_PREFIX: JSON_TYPES}
    expected = next((types for prefix, types in prefixes.items() if head.path.startswith(prefix)), XML_TYPES)
    if head.content_type in expected:
        return None
    wanted = " or ".join(sorted(filter(None, expected)))
    detail = f"the content type is {head.content_type[:100] or 'missing'}; send {wanted}"
    return refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail).problem
