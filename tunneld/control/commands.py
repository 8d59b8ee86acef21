"""The verbs of the control protocol: ONE table, verb to function.

Every face (lines, XML-RPC, JSON), `help`, the command line and the check of the man pages read `COMMANDS`; none has
logic of its own. A function gets the daemon, the request and who asks, and returns a `Reply` or raises a
`TunneldError`.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from tunneld.backends import BACKENDS
from tunneld.config.schema import Settings
from tunneld.control.reply import Caller, Execute, Reply
from tunneld.endpoint import format_peer
from tunneld.errors import UsageError
from tunneld.options import ANYWHERE, OPTIONS, TunnelOptions
from tunneld.service import Asker, TunnelService
from tunneld.tunnel import Tunnel
from tunneld.wire.lines import Item, Request

MAX_TRIM = 1_000_000
"""Parked connections: far above any `tunnels.max_parked`."""


class Daemon(Protocol):
    """What the verbs need of the process around them."""

    @property
    def service(self) -> TunnelService:
        """The tunnels."""

    @property
    def settings(self) -> Settings:
        """The settings in force."""

    def status(self) -> Item:
        """The process in one line of facts."""

    def reload(self) -> Sequence[Item]:
        """Read the configuration file again; one item for each key that changed. Raises `ConfigError`, and changes
        nothing then.
        """

    def shutdown(self, *, drain: bool) -> None:
        """End the process, with or without letting the relays finish."""


@dataclass(frozen=True, slots=True)
class Command:
    """One row: what a verb takes, what it is for, and the function that does it."""

    verb: str
    usage: str
    summary: str
    run: Callable[[Daemon, Request, Caller], Awaitable[Reply]]
    arguments: tuple[int, int] = (0, 0)  # fewest, most
    options: bool = False
    changes: bool = True  # False: looking only, safe to repeat, allowed to GET


async def open_tunnel(daemon: Daemon, request: Request, caller: Caller) -> Reply:
    """Open a tunnel; the text is its server URI."""
    backend = request.args[0] if request.args else "tcp"
    options = TunnelOptions.parse(request.options)
    asker = Asker(host=caller.host, owner=caller.owner, local_host=caller.local_host)
    tunnel = await daemon.service.open_tunnel(backend, options, asker)
    return Reply(text=str(tunnel.server_uri))


async def get_tunnel_address(daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """The text is the client URI of the tunnel with this server URI."""
    return Reply(text=str(daemon.service.get_tunnel_address(request.args[0])))


async def list_tunnels(daemon: Daemon, _request: Request, _caller: Caller) -> Reply:
    """One item for each open tunnel, oldest first."""
    items = [describe_tunnel(tunnel) for tunnel in daemon.service.tunnels()]
    return Reply(text=count(len(items), "tunnel"), items=items)


async def show_tunnel(daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """One item for the tunnel, then one for each visitor."""
    tunnel = daemon.service.find(request.args[0])
    visitors: list[Item] = [
        {"visitor": format_peer(peer), "up": relay.up, "down": relay.down} for relay, peer in tunnel.visitors.items()
    ]
    return Reply(text=count(len(visitors), "visitor"), items=[describe_tunnel(tunnel), *visitors])


async def close_tunnel(daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """Stop a tunnel now."""
    tunnel = await daemon.service.close(request.args[0])
    return Reply(text=f"closed {tunnel.id}")


async def drain_tunnel(daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """Take nobody new; the tunnel closes when its last relay ends."""
    tunnel = daemon.service.find(request.args[0])
    tunnel.drain()
    return Reply(text=f"draining {tunnel.id}, {count(len(tunnel.visitors), 'visitor')} left")


async def trim_tunnel(daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """Close surplus parked server connections."""
    tunnel = daemon.service.find(request.args[0])
    keep = request.args[1]
    if not (keep.isascii() and keep.isdigit() and len(keep) <= len(str(MAX_TRIM))):
        raise UsageError(f"not a number of server connections to keep: {keep!r}")
    return Reply(text=f"closed {count(tunnel.trim(int(keep)), 'parked server connection')} of {tunnel.id}")


async def watch_tunnels(daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """A stream of events, of all tunnels or of one. The first says that watching has begun."""
    tunnel = daemon.service.find(request.args[0]).id if request.args else None
    return Reply(stream=_stream(daemon, tunnel))


async def _stream(daemon: Daemon, tunnel: str | None) -> AsyncGenerator[Item, None]:
    async with daemon.service.events.watch(daemon.settings.daemon.watch_backlog, tunnel) as watcher:
        yield {"event": "watching", "id": tunnel or "all"}
        async for event in watcher:
            yield event


async def status(daemon: Daemon, _request: Request, _caller: Caller) -> Reply:
    """The process in one item."""
    return Reply(items=[daemon.status()])


async def reload(daemon: Daemon, _request: Request, _caller: Caller) -> Reply:
    """Read the configuration again."""
    items = daemon.reload()
    return Reply(text=f"{count(len(items), 'key')} changed", items=items)


async def shut_down(daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """End the daemon, now or after a drain."""
    if request.args not in {(), ("drain",)}:
        raise UsageError(f"shutdown takes nothing or the word drain, not {request.args[0]!r}")
    drain = bool(request.args)
    daemon.shutdown(drain=drain)
    return Reply(text="draining, then stopping" if drain else "stopping")


async def give_help(_daemon: Daemon, request: Request, _caller: Caller) -> Reply:
    """All verbs, or one with what it takes."""
    if not request.args:
        return Reply(items=[{"verb": usage(command), "does": command.summary} for command in COMMANDS.values()])
    command = find_command(request.args[0])
    items: list[Item] = [{"verb": usage(command), "does": command.summary}]
    if command.options:
        items += [{"option": f"{key}={row.takes}", "does": row.summary} for key, row in OPTIONS.items()]
        items += [{"backend": name} for name in BACKENDS]
    return Reply(items=items)


async def leave(_daemon: Daemon, _request: Request, _caller: Caller) -> Reply:
    """End this control connection; tunnels stay."""
    return Reply(text="bye", closing=True)


ONE = (1, 1)
REFERENCE = "URI|ID"

COMMANDS: dict[str, Command] = {
    row.verb.lower(): row
    for row in (
        Command(
            "openTunnel",
            "[backend] [key=value ...]",
            "open a tunnel; says the server URI, where the hidden server connects",
            open_tunnel,
            arguments=(0, 1),
            options=True,
        ),
        Command(
            "getTunnelAddress",
            "URI",
            "say the client URI that belongs to a server URI",
            get_tunnel_address,
            arguments=ONE,
            changes=False,
        ),
        Command("list", "", "all open tunnels, a line each", list_tunnels, changes=False),
        Command("show", REFERENCE, "one tunnel and its visitors", show_tunnel, arguments=ONE, changes=False),
        Command("close", REFERENCE, "stop a tunnel now", close_tunnel, arguments=ONE),
        Command("drain", REFERENCE, "let a tunnel's relays finish, take nobody new", drain_tunnel, arguments=ONE),
        Command(
            "trim",
            f"{REFERENCE} COUNT",
            "close parked server connections until COUNT are left",
            trim_tunnel,
            arguments=(2, 2),
        ),
        Command(
            "watch",
            f"[{REFERENCE}]",
            "say what happens, until anything is typed",
            watch_tunnels,
            arguments=(0, 1),
            changes=False,
        ),
        Command("status", "", "the daemon in a line of facts", status, changes=False),
        Command("reload", "", "read the configuration file again", reload),
        Command(
            "shutdown", "[drain]", "end the daemon; with drain, let relays finish first", shut_down, arguments=(0, 1)
        ),
        Command("help", "[verb]", "this list, or all that one verb takes", give_help, arguments=(0, 1), changes=False),
        Command("quit", "", "end this control connection; tunnels stay open", leave, changes=False),
    )
}


def executor(daemon: Daemon) -> Execute:
    """The function through which every face carries out requests."""

    async def execute(request: Request, caller: Caller) -> Reply:
        command = find_command(request.verb)
        fewest, most = command.arguments
        if not fewest <= len(request.args) <= most:
            raise UsageError(f"usage: {usage(command)}")
        if request.options and not command.options:
            raise UsageError(f"{command.verb} takes no {next(iter(request.options))}=; usage: {usage(command)}")
        return await command.run(daemon, request, caller)

    return execute


def find_command(verb: str) -> Command:
    """The row of a verb, in any case of letters. Raises `UsageError` naming the nearest one."""
    command = COMMANDS.get(verb.lower())
    if command is None:
        near = difflib.get_close_matches(verb.lower(), COMMANDS, n=1)
        hint = f"did you mean {COMMANDS[near[0]].verb}? " if near else ""
        raise UsageError(f"unrecognized verb {verb!r}: {hint}help lists them all")
    return command


def usage(command: Command) -> str:
    """`show URI|ID`."""
    return f"{command.verb} {command.usage}".rstrip()


def count(number: int, noun: str) -> str:
    """`1 tunnel`, `2 tunnels`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_tunnel(tunnel: Tunnel) -> Item:
    """What `list` and `show` say of a tunnel; times in seconds, sizes in octets."""
    opening = tunnel.opening
    up, down = tunnel.octets
    return {
        "id": tunnel.id,
        "name": opening.options.name or None,
        "backend": opening.backend,
        "phase": tunnel.phase.value,
        "server": str(tunnel.server_uri),
        "client": str(tunnel.client_uri),
        "owner": opening.owner,
        "server_from": str(opening.admits or ANYWHERE),
        "persist": opening.options.persist,
        "age": int(trio.current_time() - tunnel.opened_at),
        "visitors": len(tunnel.visitors),
        "waiting": tunnel.waiting,
        "parked": tunnel.parked,
        "served": tunnel.served,
        "up": up,
        "down": down,
    }
