"""Server-sent events for one visible page: what has changed since the last snapshot, and new events.

    event: hello      who is logged in, and the version of the relay                         first of all
    event: snapshot   status, tunnels that changed or closed, visitors of one tunnel         at each tick
    event: events     events of tunnels; its id is the Last-Event-ID with which to go on     if there are any
    event: end        the session is over, or another page took the place of this one        last of all

A page that is closed, hidden or cut off leaves nothing behind, and one that connects again gets everything anew, except
events that it has.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

import structlog
import trio
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tunneld import __version__
from tunneld.config.http import PageSettings
from tunneld.directory.reply import Execute
from tunneld.errors import LimitReachedError
from tunneld.http.page.feed import Feed
from tunneld.policy.access import Grant

log = structlog.get_logger("http")

FEED_LINGER = 30.0
"""Seconds that a feed goes on without a page: pages that are reloaded, or were hidden for a moment, miss no event."""

EVENTS_AT_FIRST = 100
"""Events for a page that has none yet: more than a screen."""


@dataclass(slots=True)
class _Running:
    feed: Feed
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    pages: int = 0


class PageFeeds:
    """The feeds that run, one for each view that a page has open, and the number of pages.

    run
    └─ feed ×N        until no page has used it for `FEED_LINGER` seconds
    """

    def __init__(self, execute: Execute, settings: Callable[[], PageSettings]) -> None:
        """`settings` is called at each use."""
        self._execute = execute
        self._settings = settings
        self._running: dict[Grant, _Running] = {}  # by view
        self._streams: Counter[str] = Counter()  # by credential
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the feeds until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    @contextmanager
    def use(self, grant: Grant) -> Iterator[Feed]:
        """The feed of what this grant sees, for one page. Raises `LimitReachedError`."""
        self._check(grant)
        self._streams[grant.name] += 1
        running = self._running.get(grant.view)
        if running is None:
            running = self._running[grant.view] = _Running(self._new(grant.view))
            self._nursery.start_soon(self._run, grant.view, running)
        running.pages += 1
        running.scope.deadline = math.inf
        try:
            yield running.feed
        finally:
            running.pages -= 1
            self._streams[grant.name] -= 1
            if not running.pages:
                running.scope.deadline = trio.current_time() + FEED_LINGER

    def _new(self, view: Grant) -> Feed:
        return Feed(self._execute, view, lambda: self._settings().interval)

    def _check(self, grant: Grant) -> None:
        settings = self._settings()
        total, own = self._streams.total(), self._streams[grant.name]
        if total >= settings.max_streams:
            raise LimitReachedError(f"{total} of {settings.max_streams} pages are open (http.page.max_streams)")
        limit = settings.max_streams_per_credential
        if grant.name and own >= limit:
            raise LimitReachedError(
                f"{grant.title} has {own} of {limit} pages open (http.page.max_streams_per_credential)"
            )

    async def _run(self, view: Grant, running: _Running) -> None:
        try:
            with running.scope:
                await running.feed.run()
        except Exception:
            log.exception("internal error: the web page begins anew")
            running.feed.fail()
        finally:
            del self._running[view]


@dataclass(frozen=True, slots=True)
class Viewer:
    """The page at the other end of a stream."""

    grant: Grant
    renew: Callable[[], Grant | None]  # its grant at a later time; None: the session is over
    has_session: bool  # so it can log out
    tunnel: str  # that it has open; may be empty
    last_event: str  # the id of the last events that it has


class PageStream:
    """An ASGI response: the stream of one page.

    request
    └─ listener     waits until the page closes the stream, and then cancels the writer
    """

    def __init__(self, feeds: PageFeeds, viewer: Viewer) -> None:
        self._feeds = feeds
        self._viewer = viewer

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Starlette calls this. Raises `LimitReachedError` before it has begun."""
        with self._feeds.use(self._viewer.grant) as feed:
            async with aclosing(follow(feed, self._viewer)) as messages, trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
                headers = [(b"content-type", b"text/event-stream")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for message in messages:
                    await send({"type": "http.response.body", "body": message.encode(), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                nursery.cancel_scope.cancel()


async def _cancel_on_disconnect(receive: Receive, writer: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    writer.cancel()


async def follow(feed: Feed, viewer: Viewer) -> AsyncGenerator[str, None]:
    """The messages for one page, until its session is over."""
    seen, event = 0, _first_event(feed, viewer.last_event)
    grant, tunnel = viewer.grant, viewer.tunnel
    hello = {"name": grant.name, "role": grant.role.value, "session": viewer.has_session, "version": __version__}
    yield _message("hello", json.dumps(hello))
    if tunnel:
        feed.wanted[tunnel] += 1
        feed.hurry()
    try:
        while True:
            if feed.version and (not tunnel or tunnel in feed.visitors):
                yield _message("snapshot", _snapshot(feed, seen, tunnel))
                seen = feed.version
            if new := [(number, text) for number, text in feed.events if number > event]:
                event = new[-1][0]
                rows = ",".join(text for _, text in new)
                yield _message("events", f"[{rows}]", f"{feed.epoch}.{event}")
            await feed.tick()
            if feed.has_failed:
                return
            now = viewer.renew()
            if now is None or now.view != grant.view:
                yield _message("end", json.dumps("the session has ended"))
                return
    finally:
        if tunnel:
            feed.wanted[tunnel] -= 1


def _first_event(feed: Feed, last_event: str) -> int:
    """The number of the last event that a page has, or that it need not have."""
    epoch, _, number = last_event.partition(".")
    if epoch == feed.epoch and number.isdecimal() and len(number) < len(str(2**63)):
        return int(number)
    return max(0, feed.event_count - EVENTS_AT_FIRST)


def _snapshot(feed: Feed, seen: int, tunnel: str) -> str:
    """What has changed since version `seen`; 0: everything, and what the page has besides is gone."""
    rows = ",".join(row.text for row in feed.rows.values() if row.version > seen)
    gone = [name for version, name in feed.gone if version > seen and name not in feed.rows]
    about: Mapping[str, object] = {
        "full": seen == 0,
        "total": feed.total,
        "status": feed.status or None,
        "gone": gone if seen else [],
        "visitors": feed.visitors.get(tunnel),
    }
    return f'{json.dumps(about)[:-1]}, "tunnels": [{rows}]}}'


def _message(event: str, data: str, identifier: str = "") -> str:
    """One server-sent event. JSON has no line ends, so `data` is one line."""
    return (f"id: {identifier}\n" if identifier else "") + f"event: {event}\ndata: {data}\n\n"


def viewer_of(request: Request, grant: Grant, renew: Callable[[], Grant | None], *, has_session: bool) -> Viewer:
    """The page that sent a request for a stream."""
    tunnel = request.query_params.get("tunnel", "")[:64]
    return Viewer(grant, renew, has_session, tunnel, request.headers.get("last-event-id", "")[:64])
