"""The control verbs as commands of `tunnel`: one function each, from the parsed options to text on standard output.

Their names, arguments and options are in commands.py.
"""

from __future__ import annotations

import argparse
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING

from tunneld.cli.access import access, form
from tunneld.cli.common import on_interrupt, printable, say
from tunneld.cli.tables import (
    BANS,
    CHANGES,
    PENALTIES,
    RESERVATIONS,
    SETTINGS,
    SHORT_CHANGES,
    TUNNELS,
    VISITORS,
    Form,
    Record,
    advertised,
    facts,
    json_lines,
    short_columns,
    table,
    visitor_columns,
)
from tunneld.errors import (
    EndedError,
    ExpiredError,
    LimitReachedError,
    NoSuchTunnelError,
    RefusedError,
    RelayUnreachableError,
    RemoteProtocolError,
    UsageError,
)
from tunneld.policy.units import count
from tunneld.wire.records import is_count

if TYPE_CHECKING:
    from tunneld.client import Client

DRAINED = "drained"
"""The reason of the `closed` event when the last visitor of a draining tunnel has left."""
TUNNEL_GONE_CODES = frozenset({NoSuchTunnelError.code, EndedError.code, ExpiredError.code})
"""Error codes for a request about a tunnel that has ended in the meantime; the `closed` event then says why."""
RESTART_STEP_TIMEOUT = 40.0
"""Seconds for each of the two steps of a restart, if `--timeout` is less: the relay gives the new program half a minute
to check its configuration (`CHECK_TIMEOUT` in daemon/ending.py), and the start itself may take as long.
"""
TIME_OF_DAY, DATED = "%H:%M:%S", "%Y-%m-%d %H:%M:%S"
Run = Callable[["Client", argparse.Namespace, Form], Awaitable[str]]


async def open_tunnel(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the server URI."""
    backend, words = split_words(options.words)
    answer = await client.call("openTunnel", *backend, **words)
    return json_lines([{"server": answer.text}]) if shape is Form.JSON else answer.text + "\n"


async def address(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the client URI."""
    answer = await client.call("getTunnelAddress", options.uri)
    return json_lines([{"client": answer.text}]) if shape is Form.JSON else answer.text + "\n"


async def list_tunnels(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return a table of all tunnels; for people one that fits most terminals, unless they ask for `--keys`."""
    records: Sequence[Mapping[str, str]] = (await client.call("list")).items
    if shape is Form.PEOPLE:
        records = advertised(records)
    if shape is not Form.PEOPLE or options.keys:
        return table(records, TUNNELS, shape)
    return (
        table(records, short_columns(records, shutil.get_terminal_size().columns), shape)
        if records
        else "no open tunnels\n"
    )


async def show(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the facts of a tunnel, then a table of its visitors."""
    records = (await client.call("show", options.ref)).items
    if not records:
        raise RemoteProtocolError("invalid answer of the relay: it describes no tunnel")
    tunnel, *visitors = records
    if shape is Form.JSON:
        return json_lines([tunnel, *visitors])
    if shape is Form.FIELDS:
        return facts(tunnel, shape) + "".join(f"visitor\t{line}" for line in _lines(table(visitors, VISITORS, shape)))
    return facts(tunnel, shape) + ("\n" + table(visitors, visitor_columns(visitors), shape) if visitors else "")


async def status(client: Client, _options: argparse.Namespace, shape: Form) -> str:
    """Return the facts of the daemon."""
    return "".join(facts(record, shape) for record in (await client.call("status")).items)


async def settings(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return a table of keys and values."""
    return table((await client.call("settings", *filter(None, [options.key_path]))).items, SETTINGS, shape)


async def penalties(client: Client, _options: argparse.Namespace, shape: Form) -> str:
    """Return a table of penalties."""
    records = (await client.call("penalties")).items
    return "no penalties\n" if shape is Form.PEOPLE and not records else table(records, PENALTIES, shape)


async def pardon(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    return text((await client.call("pardon", options.address)).text, shape)


async def reload(client: Client, _options: argparse.Namespace, shape: Form) -> str:
    """Return a table of the keys that changed."""
    answer = await client.call("reload")
    columns = SHORT_CHANGES if shape is Form.PEOPLE else CHANGES
    changes = table(answer.items, columns, shape) if answer.items else ""
    return changes or text(answer.text, shape)


async def restart(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Wait until the relay has restarted, then return the text to print."""
    options.timeout = client.timeout = max(client.timeout, RESTART_STEP_TIMEOUT)
    await client.call("restart")
    with suppress(RelayUnreachableError):
        async with client.stream("watch") as events:  # the old program ends the stream when it stops
            async for _ in events:
                pass
    async with access(options).connect() as again:
        (status,) = (await again.call("status")).items
    kept = f"{count(_number(status, 'tunnels'), 'tunnel')} and {count(_number(status, 'visitors'), 'visitor')}"
    return text(f"restarted as version {_fact(status, 'version')}, with {kept}", shape)


async def close(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    return text((await client.call("close", options.ref, *(("keep",) if options.keep else ()))).text, shape)


async def drain(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay. With `--wait`, first print a line for each visitor that leaves, until the tunnel
    has closed. Raises `LimitReachedError` if it closed before the last visitor had left.
    """
    if not options.wait:
        return text((await client.call("drain", options.ref)).text, shape)
    async with access(options).connect() as watching, watching.stream("watch", options.ref) as events:
        say(text((await client.call("drain", options.ref)).text, shape), end="")
        left = 0
        try:
            left = len((await client.call("show", options.ref)).items) - 1
        except RefusedError as error:
            if error.reply_code not in TUNNEL_GONE_CODES:
                raise
        async for event in events:
            match _fact(event, "event"):
                case "draining":
                    left = _number(event, "visitors")
                case "left":
                    left -= 1
                    say(text(f"{count(left, 'visitor')} still connected", shape), end="")
                case "closed" if _fact(event, "reason") == DRAINED:
                    return text(DRAINED, shape)
                case "closed":
                    raise LimitReachedError(
                        f"tunnel {_fact(event, 'id')} closed before all visitors had left: {event['reason']}"
                    )
    raise RelayUnreachableError("the relay stopped before all visitors of the tunnel had left")


async def reservations(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return a table of reservations."""
    records = (await client.call("reservations", *((options.which,) if options.which else ()))).items
    return "no reserved addresses\n" if shape is Form.PEOPLE and not records else table(records, RESERVATIONS, shape)


async def release(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    return text((await client.call("release", options.which)).text, shape)


async def trim(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    return text((await client.call("trim", options.ref, options.count)).text, shape)


async def kick(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    return text((await client.call("kick", options.ref, options.visitor)).text, shape)


async def set_limits(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    unnamed, words = split_words(options.words)
    if unnamed:
        raise UsageError(f"{unnamed[0]!r} is not of the form key=value, such as bandwidth=1M")
    return text((await client.call("set", options.ref, **words)).text, shape)


async def ban(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    seconds = () if options.seconds is None else (f"{options.seconds:g}",)
    return text((await client.call("ban", options.network, *seconds)).text, shape)


async def unban(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    return text((await client.call("unban", options.network)).text, shape)


async def bans(client: Client, _options: argparse.Namespace, shape: Form) -> str:
    """Return a table of bans."""
    records = (await client.call("bans")).items
    return "no bans\n" if shape is Form.PEOPLE and not records else table(records, BANS, shape)


async def share(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the link, or the answer of the relay."""
    word = "revoke" if options.revoke else str(options.seconds)
    answer = await client.call("share", options.name, word)
    if shape is Form.JSON and not options.revoke:
        return json_lines([{"link": answer.text}])
    return text(answer.text, shape)


async def shut_down(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Return the answer of the relay."""
    return text((await client.call("shutdown", *(("drain",) if options.drain else ()))).text, shape)


async def watch(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Print events until the relay stops."""
    tunnel = (options.ref,) if options.ref else ()
    async with client.stream("watch", *tunnel, since=options.since) as events:
        async for event in events:
            say(event_line(event, shape, dated=options.since is not None), end="")
    return ""


RUN: Mapping[str, Run] = {
    "open": open_tunnel,
    "address": address,
    "list": list_tunnels,
    "show": show,
    "close": close,
    "drain": drain,
    "trim": trim,
    "reservations": reservations,
    "release": release,
    "share": share,
    "kick": kick,
    "set": set_limits,
    "watch": watch,
    "status": status,
    "settings": settings,
    "penalties": penalties,
    "pardon": pardon,
    "ban": ban,
    "unban": unban,
    "bans": bans,
    "reload": reload,
    "restart": restart,
    "shutdown": shut_down,
}
"""The function of each verb in `VERBS`, by its name."""


async def carry_out(name: str, options: argparse.Namespace) -> int:
    """Carry out the verb of this name: send the request to the relay and print the answer. Returns 0, or raises."""
    relay = access(options)
    with on_interrupt(signal.SIG_DFL):
        async with relay.connect() as client:
            shown = await RUN[name](client, options, form(options))
        say(shown, end="")
    return 0


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the backend, if there is one, from `key=value` options. Raises `UsageError`."""
    pairs = [word.partition("=") for word in words]
    backends = [word for word, equals, _ in pairs if not equals]
    if len(backends) > 1:
        raise UsageError(f"more than one backend given: {', '.join(backends)}")
    given = [key for key, equals, _ in pairs if equals]
    for key in given:
        if not key.isidentifier() or given.count(key) > 1:
            raise UsageError(f"option {key!r} is {'given twice' if key.isidentifier() else 'not a valid key'}")
    return backends, {key: value for key, equals, value in pairs if equals}


def text(sentence: str, shape: Form) -> str:
    """Format the text of a reply."""
    return json_lines([{"text": sentence}]) if shape is Form.JSON else printable(sentence) + "\n"


def event_line(event: Record, shape: Form, *, dated: bool = False) -> str:
    """Format an event: `12:04:31  visitor   t4  from=203.0.113.5:4242`, or with the full time and tabs. `dated` is for
    people, too, and for events of other days.
    """
    if shape is Form.JSON:
        return json_lines([event])
    rest = " ".join(f"{key}={printable(value)}" for key, value in event.items() if key not in {"time", "event", "id"})
    time, name, tunnel = (printable(event.get(key, "")) for key in ("time", "event", "id"))
    if shape is Form.FIELDS:
        return f"{time}\t{name}\t{tunnel}\t{rest}\n"
    shown = clock(time, DATED if dated else TIME_OF_DAY)
    return f"{shown:{19 if dated else 8}}  {name:9} {tunnel:5} {rest}".rstrip() + "\n"


def clock(time: str, form: str) -> str:
    """Convert a time in ISO 8601 to local time; empty if it is not valid."""
    try:
        return datetime.fromisoformat(time).astimezone().strftime(form)
    except ValueError:
        return ""


def _fact(record: Record, key: str) -> str:
    """A value of a record. Raises `RemoteProtocolError` if the relay left it out."""
    if key not in record:
        raise RemoteProtocolError(f"invalid answer of the relay: {key} is missing")
    return record[key]


def _number(record: Record, key: str) -> int:
    """A count in a record. Raises `RemoteProtocolError`."""
    value = _fact(record, key)
    if not is_count(value):
        raise RemoteProtocolError(f"invalid answer of the relay: {key} is not a number")
    return int(value)


def _lines(text: str) -> Sequence[str]:
    return text.splitlines(keepends=True)
