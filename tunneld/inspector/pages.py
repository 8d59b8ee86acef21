"""What the inspector's page asks for, and whether it may.

    /?token=...                  sets the cookie, and goes on to the page
    /inspect/                    the page; inspector.js, inspector.css
    /inspect/api/events          rows of the list, live (server-sent events)
    /inspect/api/check           what is wrong with a search
    /inspect/api/exchanges/ID    everything about one; /curl; /request, /response: the body to save
    /inspect/api/har             all that match, as a file
    POST api/replay, api/clear

Every request needs the token, which comes from the link only. Another page in the same browser may be hostile: one of
a visitor, shown by the local server on another port of this machine, which for cookies is the same site. So what comes
from another origin is refused, by Origin and Sec-Fetch-Site; and no other site can take our name by DNS rebinding,
because Host must be an address, localhost, or what the user has given.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Final

import trio

from tunneld.errors import TunneldError
from tunneld.inspector.export import curl_command, har_entry, har_file
from tunneld.inspector.recorder import Recorder
from tunneld.inspector.records import Exchange
from tunneld.inspector.replay import Edits, Replayer, ReplayTarget
from tunneld.inspector.requests import edits_of
from tunneld.inspector.search import Condition, matcher
from tunneld.inspector.views import detail_of, row_of
from tunneld.inspector.web import PageAnswer, PageRequest

PREFIX: Final = "/inspect/"
"""The folder of the page: its cookie is not sent to other servers on this machine, but for one with the same folder."""
FILES: Final = {
    "": ("index.html", "text/html; charset=utf-8"),
    "inspector.js": ("inspector.js", "text/javascript; charset=utf-8"),
    "bodies.js": ("bodies.js", "text/javascript; charset=utf-8"),
    "inspector.css": ("inspector.css", "text/css; charset=utf-8"),
}
SECURITY: Final = [
    (
        "Content-Security-Policy",
        (
            "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        ),
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]
EVENT_DELAY: Final = 0.1
"""Seconds between two pieces of the live list: what changes meanwhile is sent once."""
ALIVE_INTERVAL: Final = 20.0
"""Seconds after which a silent stream of events says that it is alive."""
ROWS_AT_ONCE: Final = 100
"""Rows in one piece."""
ENTER = b"""<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/inspect/">
<title>Inspector</title>
<p><a href="/inspect/">Inspector</a></p>
"""
"""Not a redirect: the browser would leave out a SameSite=Strict cookie if the link was on another site."""
NO_TOKEN = b"open the link that `tunnel expose --inspect` has printed: it contains the token\n"


class PageError(Exception):
    """Answered with a status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Inspected:
    """What the pages show, and the local servers by exposure."""

    recorder: Recorder
    replayer: Replayer
    token: str
    host: str = ""
    """What the user has given as the address to listen at."""
    port: int = 0
    servers: dict[str, ReplayTarget] = field(default_factory=dict)

    @property
    def cookie(self) -> str:
        """The name of the cookie. Cookies know no ports, so it has ours."""
        return f"tunneld_inspector_{self.port}"


class InspectorPages:
    """Answers the requests of the page."""

    def __init__(self, inspected: Inspected) -> None:
        self._inspected = inspected
        self._store = inspected.recorder.store
        self._routes: dict[tuple[str, str], Callable[[PageRequest], Awaitable[PageAnswer]]] = {
            ("GET", "api/events"): self._events,
            ("GET", "api/check"): self._check,
            ("GET", "api/har"): self._har,
            ("POST", "api/replay"): self._replay,
            ("POST", "api/clear"): self._clear,
        }

    async def answer(self, request: PageRequest) -> PageAnswer:
        """Answer one request."""
        try:
            made = await self._answer(request)
        except PageError as error:
            made = PageAnswer(error.status, body=f"{error}\n".encode())
        except TunneldError as error:
            made = PageAnswer(422, body=f"{error}\n".encode())
        made.headers.extend(SECURITY)
        return made

    async def _answer(self, request: PageRequest) -> PageAnswer:
        inspected = self._inspected
        check_host(request.headers.get("host", ""), inspected.host)
        if request.method not in {"GET", "HEAD", "POST"}:
            raise PageError(405, "GET, HEAD or POST")
        given = request.query.get("token", "")
        if given and request.method == "GET" and request.path in {"/", PREFIX}:
            if not hmac.compare_digest(given.encode(), inspected.token.encode()):
                raise PageError(401, NO_TOKEN.decode().strip())
            cookie = f"{inspected.cookie}={inspected.token}; Path={PREFIX}; HttpOnly; SameSite=Strict"
            return PageAnswer(content_type="text/html; charset=utf-8", body=ENTER, headers=[("Set-Cookie", cookie)])
        if request.path in {"/", PREFIX.rstrip("/")}:
            return PageAnswer(303, headers=[("Location", PREFIX)])
        if not request.path.startswith(PREFIX):
            raise PageError(404, "there is no such page")
        self._check_cookie(request)
        check_origin(request)
        return await self._route(request, request.path.removeprefix(PREFIX))

    def _check_cookie(self, request: PageRequest) -> None:
        pairs = (pair.strip().partition("=") for pair in request.headers.get("cookie", "").split(";"))
        given = [value for name, _, value in pairs if name == self._inspected.cookie]
        token = self._inspected.token.encode()
        if not any(hmac.compare_digest(value.encode(), token) for value in given):
            raise PageError(401, NO_TOKEN.decode().strip())

    async def _route(self, request: PageRequest, path: str) -> PageAnswer:
        method = "GET" if request.method == "HEAD" else request.method
        if method == "GET" and path in FILES:
            name, media = FILES[path]
            return PageAnswer(content_type=media, body=files(__package__).joinpath("page", name).read_bytes())
        if (route := self._routes.get((method, path))) is not None:
            return await route(request)
        match path.split("/"):
            case ["api", "exchanges", number, *rest] if method == "GET":
                return self._exchange(self._find(number), request, "/".join(rest))
        raise PageError(404, "there is no such page")

    def _find(self, number: object) -> Exchange:
        text = str(number)
        found = self._store.get(int(text)) if text.isascii() and text.isdigit() and len(text) < 16 else None
        if found is None:
            raise PageError(404, "this request is not kept any more")
        return found

    def _exchange(self, exchange: Exchange, request: PageRequest, part: str) -> PageAnswer:
        reveal, decoded = _reveals(request), self._store.limits.decoded
        if not part:
            return _json(detail_of(exchange, decoded, reveal=reveal))
        if part == "curl" and exchange.request is not None:
            server = self._inspected.servers.get(exchange.exposure)
            base = server.url if server else "http://localhost"
            return PageAnswer(body=curl_command(exchange, base, reveal=reveal).encode())
        message = {"request": exchange.request, "response": exchange.response}.get(part)
        if message is None:
            raise PageError(404, "there is no such page")
        return _file("application/octet-stream", f"{part}-{exchange.id}.bin", bytes(message.body))

    async def _check(self, request: PageRequest) -> PageAnswer:
        """Whether a search is one: an EventSource does not tell what is wrong."""
        _condition(request, 0)
        return _json({})

    async def _har(self, request: PageRequest) -> PageAnswer:
        reveal, decoded = _reveals(request), self._store.limits.decoded
        if number := request.query.get("id"):
            chosen: Iterable[Exchange] = [self._find(number)]
        else:
            chosen = [exchange async for exchange in _matching(list(self._store), _condition(request, decoded))]
        entries = []
        for exchange in chosen:
            if exchange.request is not None:
                entries.append(har_entry(exchange, decoded, reveal=reveal))
                await trio.lowlevel.checkpoint()  # the relay goes on
        return _file("application/json", "tunnel.har", json.dumps(har_file(entries)).encode())

    async def _replay(self, request: PageRequest) -> PageAnswer:
        number, edits = edits_of(request.body)
        exchange = self._find(number)
        server = self._inspected.servers.get(exchange.exposure)
        if server is None:
            raise PageError(409, f"the exposure {exchange.exposure} has ended")
        await self._inspected.replayer.replay(exchange, edits or Edits(), server)
        return _json({"replayed": exchange.id})

    async def _clear(self, _request: PageRequest) -> PageAnswer:
        self._store.clear()
        return _json({})

    async def _events(self, request: PageRequest) -> PageAnswer:
        condition = _condition(request, self._store.limits.decoded)
        reveal = _reveals(request)
        return PageAnswer(content_type="text/event-stream", pieces=lambda: self._live(condition, reveal=reveal))

    async def _live(self, condition: Condition, *, reveal: bool) -> AsyncGenerator[bytes, None]:
        """All that match, and then every change."""
        shown: set[int] = set()
        with self._store.watching() as watch:
            watch.changed |= {exchange.id for exchange in self._store}
            watch.event.set()
            yield _event("reset", {})
            while True:
                changed: set[int] = set()
                with trio.move_on_after(ALIVE_INTERVAL):
                    changed = await watch.wait()
                rows: list[dict[str, Any]] = []
                for number in sorted(changed):
                    exchange = self._store.get(number)
                    if exchange is not None and condition(exchange):
                        rows.append(row_of(exchange, reveal=reveal))
                        shown.add(number)
                        if len(rows) >= ROWS_AT_ONCE:
                            yield _event("rows", rows)
                            rows = []
                    elif number in shown:
                        yield _event("gone", [number])
                        shown.discard(number)
                    await trio.lowlevel.checkpoint()
                gone = [number for number in shown if number not in self._store]
                shown.difference_update(gone)
                if rows:
                    yield _event("rows", rows)
                if gone:
                    yield _event("gone", gone)
                yield _event("state", self._state())
                await trio.sleep(EVENT_DELAY)

    def _state(self) -> dict[str, Any]:
        return {
            "count": len(self._store),
            "kept": self._store.kept,
            "memory": self._store.limits.memory,
            "dropped": self._store.dropped,
            "unseen": self._inspected.recorder.unseen,
            "exposures": {name: server.url for name, server in self._inspected.servers.items()},
        }


def check_host(host: str, ours: str) -> None:
    """Refuse the names that a page of another site may have made lead here. Raises `PageError`."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name.lower() not in {"localhost", ours.lower()} or not name:
            raise PageError(421, "open the inspector by its address, as printed, or as localhost") from None


def check_origin(request: PageRequest) -> None:
    """Refuse what a page of another origin has sent. Raises `PageError`."""
    headers = request.headers
    origin, site = headers.get("origin", ""), headers.get("sec-fetch-site", "")
    ours = f"http://{headers.get('host', '')}"
    if (origin and origin != ours) or site in {"cross-site", "same-site"}:
        raise PageError(403, "requests from other pages are refused")
    if request.method == "POST":
        if origin != ours:
            raise PageError(403, "a request that changes something must come from the page (Origin is missing)")
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise PageError(415, "the body must be application/json")


async def _matching(exchanges: Iterable[Exchange], condition: Condition) -> AsyncIterator[Exchange]:
    for exchange in exchanges:
        if exchange.is_kept and condition(exchange):
            yield exchange
        await trio.lowlevel.checkpoint()


def _condition(request: PageRequest, decoded: int) -> Condition:
    try:
        return matcher(request.query.get("q", ""), decoded)
    except ValueError as error:
        raise PageError(400, str(error)) from None


def _reveals(request: PageRequest) -> bool:
    return request.query.get("reveal") == "1"


def _json(value: object) -> PageAnswer:
    return PageAnswer(content_type="application/json", body=json.dumps(value).encode())


def _file(content_type: str, name: str, body: bytes) -> PageAnswer:
    return PageAnswer(
        content_type=content_type, body=body, headers=[("Content-Disposition", f'attachment; filename="{name}"')]
    )


def _event(name: str, value: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()
