"""The verb `watch`: events as they happen, perhaps after those of the past.

    watching ──► past events, in pages ──► live ──► events as they happen

Between the last page and the first live event nothing is missed: the watcher is added in the same turn of the event
loop in which the history had no more.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence

from tunneld.control.verbs import DaemonControl
from tunneld.directory.event_database import EventQuery
from tunneld.directory.event_history import EventHistory
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.errors import NoSuchTunnelError, ShortageError, StoreError, UsageError
from tunneld.policy.access import Grant
from tunneld.policy.options import Option
from tunneld.policy.units import parse_duration
from tunneld.wire.lines import ControlRequest, Item

WATCH_OPTIONS = {
    "since": Option(parse_duration, "TIME", "first the events of this time until now: seconds, 30m, 2h, 7d"),
}


async def watch_tunnels(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """A stream of events of one tunnel, or of all that the caller may see. The first event is `watching`."""
    grant = caller.known_grant
    since = _since(request)
    query, missing = EventQuery(since or 0.0, None if grant.sees_all else grant.name), None
    tunnel: str | None = None
    if request.args:
        try:
            record = await daemon.service.find(request.args[0], grant)
        except NoSuchTunnelError as error:  # perhaps there was one
            if since is None or "://" in request.args[0]:
                raise
            missing = error
            query = EventQuery(query.since, query.owner, request.args[0], name=request.args[0])
        else:
            tunnel = record.id
            query = EventQuery(query.since, query.owner, record.id, record.opened, record.name, record.owner)
    daemon.service.events.check_limit(grant, daemon.settings.control.max_watchers)
    history = None if since is None else _history(daemon)
    return Reply(stream=_stream(daemon, tunnel, caller, history, query, missing))


def _since(request: ControlRequest) -> float | None:
    """The time of `since=`, in seconds since 1970. Raises `UsageError`."""
    for key, text in request.options.items():
        if key not in WATCH_OPTIONS:
            raise UsageError(f"unrecognized option {key!r}: watch accepts {', '.join(WATCH_OPTIONS)}")
        try:
            return time.time() - float(WATCH_OPTIONS[key].read(text))
        except ValueError as error:
            raise UsageError(f"option {key}={text!r}: {error}") from None
    return None


def _history(daemon: DaemonControl) -> EventHistory:
    history = daemon.service.history
    if history is None or not history.is_kept:
        raise UsageError("this relay keeps no past events: see events.max_kept and daemon.state in tunnel.toml(5)")
    return history


async def _stream(
    daemon: DaemonControl,
    tunnel: str | None,
    caller: Requester,
    history: EventHistory | None,
    query: EventQuery,
    missing: NoSuchTunnelError | None,
) -> AsyncGenerator[Sequence[Item], None]:
    """The events, in groups. It ends when the credential of the caller is revoked. `missing` is raised after the past
    events of a tunnel that is not open.
    """
    events, limit = daemon.service.events, daemon.settings.control.max_watchers
    events.check_limit(caller.known_grant, limit)  # others may have come before
    watching: Item = {"event": "watching", "id": tunnel or "all"}
    if history is not None:
        yield [watching]
        reader = history.reader(query)
        try:
            while page := await reader.next_page():
                if not _may_go_on(caller, query):
                    return
                yield page
        except StoreError as error:
            raise ShortageError(f"could not read past events: {error}") from None
        if missing is not None:
            raise missing
        events.check_limit(caller.known_grant, limit)
    async with events.watch(daemon.settings.daemon.watch_backlog, lambda: caller.grant_now, tunnel) as watcher:
        yield [watching if history is None else {"event": "live"}]
        async for group in watcher:
            yield group


def _may_go_on(caller: Requester, query: EventQuery) -> bool:
    """Whether the caller may still see what it asked for; its credential may have been changed meanwhile."""
    grant: Grant | None = caller.grant_now
    return grant is not None and (grant.sees_all or grant.name == query.owner)
