"""The control verbs as a person types them: one function each, from the parsed options to text on standard output."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from tunneld.cli.access import access, form
from tunneld.cli.common import on_interrupt, say
from tunneld.cli.tables import (
    CHANGES,
    RESERVATIONS,
    SETTINGS,
    TUNNELS,
    VISITORS,
    Form,
    Record,
    facts,
    json_lines,
    printable,
    table,
)
from tunneld.errors import (
    EndedError,
    LimitReachedError,
    NoSuchTunnelError,
    RefusedError,
    RelayUnreachableError,
    UsageError,
)

if TYPE_CHECKING:
    from tunneld.client import Client

REFERENCE = ("ref", "REF", "its id, a URI of it or its port, as list shows them")
DRAINED = "drained"
"""The reason that a tunnel closes for when its last visitor has left."""
OVER = frozenset({NoSuchTunnelError.code, EndedError.code})
"""How the relay refuses what is asked of a tunnel that has ended meanwhile; who watches it is told why."""
STARTED_WITHIN = 40.0
"""Seconds that a restart may take for each of its two steps, whatever `--timeout` says: first the relay gives its new
program half a minute to say that it would start (`CHECKING` in daemon/endings.py), then that starts, which takes as
long.
"""
Run = Callable[["Client", argparse.Namespace, Form], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb of `tunnel`: which of the control protocol it is, what it takes, and how its answer is shown."""

    name: str
    wire: str  # the verb of tunneld-control(7)
    summary: str
    run: Run
    arguments: Sequence[tuple[str, str, str]] = ()  # name, how it is called in usage, what it is
    nargs: str | None = None  # of the last argument


async def open_tunnel(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """The server URI."""
    backend, words = split_words(options.words)
    answer = await client.call("openTunnel", *backend, **words)
    return json_lines([{"server": answer.text}]) if shape is Form.JSON else answer.text + "\n"


async def address(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """The client URI."""
    answer = await client.call("getTunnelAddress", options.uri)
    return json_lines([{"client": answer.text}]) if shape is Form.JSON else answer.text + "\n"


async def list_tunnels(client: Client, _options: argparse.Namespace, shape: Form) -> str:
    """A table."""
    records = (await client.call("list")).items
    return "no tunnel is open\n" if shape is Form.PEOPLE and not records else table(records, TUNNELS, shape)


async def show(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """The facts of a tunnel, then a table of its visitors."""
    tunnel, *visitors = (await client.call("show", options.ref)).items
    if shape is Form.JSON:
        return json_lines([tunnel, *visitors])
    if shape is Form.FIELDS:
        return facts(tunnel, shape) + "".join(f"visitor\t{line}" for line in _lines(table(visitors, VISITORS, shape)))
    return facts(tunnel, shape) + ("\n" + table(visitors, VISITORS, shape) if visitors else "")


async def status(client: Client, _options: argparse.Namespace, shape: Form) -> str:
    """The facts of the daemon."""
    return "".join(facts(record, shape) for record in (await client.call("status")).items)


async def settings(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Keys and their values."""
    return table((await client.call("settings", *filter(None, [options.key_path]))).items, SETTINGS, shape)


async def reload(client: Client, _options: argparse.Namespace, shape: Form) -> str:
    """What changed."""
    answer = await client.call("reload")
    changes = table(answer.items, CHANGES, shape) if answer.items else ""
    return changes or text(answer.text, shape)


async def restart(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """A sentence, once the relay is there again."""
    options.timeout = client.timeout = max(client.timeout, STARTED_WITHIN)
    await client.call("restart")
    with suppress(RelayUnreachableError):
        async with client.watch() as events:  # which end with the old program
            async for _ in events:
                pass
    async with access(options).connect() as again:
        status = await again.status()
    count = f"{status['tunnels']} tunnels and {status['visitors']} visitors"
    return text(f"started again as version {status['version']}, with {count}", shape)


async def close(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """A sentence."""
    return text((await client.call("close", options.ref, *(("keep",) if options.keep else ()))).text, shape)


async def drain(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """A sentence; or one for each visitor that leaves, until the last one has. Raises `LimitReachedError` where the
    tunnel ended before that.
    """
    if not options.wait:
        return text((await client.call("drain", options.ref)).text, shape)
    async with access(options).connect() as eyes, eyes.watch(options.ref) as events:
        say(text((await client.call("drain", options.ref)).text, shape), end="")
        left = 0
        try:
            left = len((await client.call("show", options.ref)).items) - 1
        except RefusedError as error:
            if error.reply_code not in OVER:
                raise
        async for event in events:
            match event["event"]:
                case "draining":
                    left = int(event["visitors"])
                case "left":
                    left -= 1
                    say(text(f"{left} left", shape), end="")
                case "closed" if event["reason"] == DRAINED:
                    return text(DRAINED, shape)
                case "closed":
                    raise LimitReachedError(f"tunnel {event['id']} ended before its visitors left: {event['reason']}")
    raise RelayUnreachableError("the relay ended before the tunnel's visitors had left")


async def reservations(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """A table."""
    records = (await client.call("reservations", *((options.which,) if options.which else ()))).items
    return "nothing is reserved\n" if shape is Form.PEOPLE and not records else table(records, RESERVATIONS, shape)


async def release(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """A sentence."""
    return text((await client.call("release", options.which)).text, shape)


async def trim(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """A sentence."""
    return text((await client.call("trim", options.ref, options.count)).text, shape)


async def shut_down(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """A sentence."""
    return text((await client.call("shutdown", *(("drain",) if options.drain else ()))).text, shape)


async def watch(client: Client, options: argparse.Namespace, shape: Form) -> str:
    """Events as they come, until the relay ends."""
    async with client.watch(options.ref) as events:
        async for event in events:
            say(event_line(event, shape), end="")
    return ""


VERBS = (
    Verb(
        "open",
        "openTunnel",
        "open a tunnel and print its server URI, where the hidden server connects",
        open_tunnel,
        [("words", "backend | key=value", "tcp unless said otherwise, and the options that tunneld-control(7) lists")],
        nargs="*",
    ),
    Verb(
        "address",
        "getTunnelAddress",
        "print the client URI that belongs to a server URI",
        address,
        [("uri", "URI", "the server URI")],
    ),
    Verb("list", "list", "all open tunnels, a line each", list_tunnels),
    Verb("show", "show", "one tunnel and its visitors", show, [REFERENCE]),
    Verb("close", "close", "stop a tunnel now", close, [REFERENCE]),
    Verb("drain", "drain", "let a tunnel's relays finish, take nobody new", drain, [REFERENCE]),
    Verb(
        "trim",
        "trim",
        "close parked server connections until COUNT are left",
        trim,
        [REFERENCE, ("count", "COUNT", "how many to keep")],
    ),
    Verb(
        "reservations",
        "reservations",
        "which addresses are kept for whom",
        reservations,
        [("which", "PORT|NAME", "one of them, by its port or its name")],
        nargs="?",
    ),
    Verb(
        "release",
        "release",
        "give up the address of a tunnel that is away",
        release,
        [("which", "PORT|NAME", "by its port or its name")],
    ),
    Verb("watch", "watch", "say what happens to all tunnels, or to one", watch, [REFERENCE], nargs="?"),
    Verb("status", "status", "the daemon in a few facts", status),
    Verb(
        "settings",
        "settings",
        "the configuration in force",
        settings,
        [("key_path", "KEY", "only keys that begin so: control.max")],
        nargs="?",
    ),
    Verb("reload", "reload", "have the daemon read its configuration file again", reload),
    Verb("restart", "restart", "start the daemon again; tunnels and relays go along", restart),
    Verb("shutdown", "shutdown", "end the daemon; with --drain, let relays finish first", shut_down),
)


async def carry_out(verb: Verb, options: argparse.Namespace) -> int:
    """Ask the relay, print its answer. Returns the exit status 0; anything else is an exception."""
    relay = access(options)
    with on_interrupt(signal.SIG_DFL):
        async with relay.connect() as client:
            shown = await verb.run(client, options, form(options))
        say(shown, end="")
    return 0


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The backend, if one is named, and the options. Raises `UsageError`."""
    pairs = [word.partition("=") for word in words]
    backends = [word for word, equals, _ in pairs if not equals]
    if len(backends) > 1:
        raise UsageError(f"one backend at a time: {' or '.join(backends)}?")
    given = [key for key, equals, _ in pairs if equals]
    for key in given:
        if not key.isidentifier() or given.count(key) > 1:
            raise UsageError(f"option {key!r} is {'given twice' if key.isidentifier() else 'not a word'}")
    return backends, {key: value for key, equals, value in pairs if equals}


def text(sentence: str, shape: Form) -> str:
    """A sentence of the relay."""
    return json_lines([{"text": sentence}]) if shape is Form.JSON else printable(sentence) + "\n"


def event_line(event: Record, shape: Form) -> str:
    """`12:04:31  visitor   t4  from=203.0.113.5:4242`, or the same with the full time and tabs."""
    if shape is Form.JSON:
        return json_lines([event])
    rest = " ".join(f"{key}={printable(value)}" for key, value in event.items() if key not in {"time", "event", "id"})
    time, name, tunnel = (printable(event.get(key, "")) for key in ("time", "event", "id"))
    if shape is Form.FIELDS:
        return f"{time}\t{name}\t{tunnel}\t{rest}\n"
    return f"{clock(time):8}  {name:9} {tunnel:5} {rest}".rstrip() + "\n"


def clock(time: str) -> str:
    """The hour where the reader is, of a time in ISO 8601."""
    try:
        return datetime.fromisoformat(time).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return ""


def _lines(text: str) -> Sequence[str]:
    return text.splitlines(keepends=True)
