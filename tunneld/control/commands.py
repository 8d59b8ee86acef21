"""The verbs of the control protocol: ONE table, verb to function.

Every face (lines, XML-RPC, JSON), `help`, the command line and the check of the man pages read `COMMANDS`; none has
logic of its own. Each row says which role may use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tunneld.backends import BACKENDS
from tunneld.control.reply import Execute, Reply
from tunneld.control.verbs import (
    DaemonControl,
    close_tunnel,
    drain_tunnel,
    get_tunnel_address,
    join_tunnel,
    leave_tunnel,
    list_reservations,
    list_tunnels,
    open_tunnel,
    release_reservation,
    reload,
    restart,
    settings,
    show_tunnel,
    shut_down,
    status,
    trim_tunnel,
    watch_tunnels,
)
from tunneld.directory.requester import Requester
from tunneld.errors import UsageError
from tunneld.policy.access import Role, check_role
from tunneld.policy.options import OPTIONS
from tunneld.wire.lines import Item, Request


@dataclass(frozen=True, slots=True)
class Command:
    """One row: what a verb takes, what it is for, and the function that does it."""

    verb: str
    usage: str
    summary: str
    run: Callable[[DaemonControl, Request, Requester], Awaitable[Reply]]
    arguments: tuple[int, int] = (0, 0)  # fewest, most
    options: bool = False
    changes: bool = True  # False: looking only, safe to repeat, allowed to GET
    role: Role | None = Role.USER  # who may: None is for strangers, too


async def give_help(_daemon: DaemonControl, request: Request, _caller: Requester) -> Reply:
    """All verbs, or one with what it takes."""
    if not request.args:
        return Reply(items=[{"verb": usage(command), "does": command.summary} for command in COMMANDS.values()])
    command = find_command(request.args[0])
    items: list[Item] = [{"verb": usage(command), "does": command.summary}]
    if command.options:
        items += [{"option": f"{key}={row.takes}", "does": row.summary} for key, row in OPTIONS.items()]
        items += [{"backend": name} for name in BACKENDS]
    return Reply(items=items)


async def authenticate(_daemon: DaemonControl, _request: Request, _caller: Requester) -> Reply:
    """The line face keeps this verb for itself: it is about the connection. Everywhere else it makes no sense."""
    raise UsageError("auth is for connections of the line protocol; over HTTP send an Authorization header instead")


async def leave(_daemon: DaemonControl, _request: Request, _caller: Requester) -> Reply:
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
        Command(
            "close",
            f"{REFERENCE} [keep]",
            "stop a tunnel now; with keep, its address stays reserved",
            close_tunnel,
            arguments=(1, 2),
        ),
        Command("drain", REFERENCE, "let a tunnel's relays finish, take nobody new", drain_tunnel, arguments=ONE),
        Command(
            "join",
            REFERENCE,
            "serve an open tunnel again from here: for an agent that lost its control connection",
            join_tunnel,
            arguments=ONE,
        ),
        Command(
            "leave",
            REFERENCE,
            "serve a shared tunnel no more; the last one, or that of any other, drains it",
            leave_tunnel,
            arguments=ONE,
        ),
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
        Command(
            "reservations",
            "[PORT|NAME]",
            "which addresses are kept for whom, a line each",
            list_reservations,
            arguments=(0, 1),
            changes=False,
        ),
        Command(
            "release", "PORT|NAME", "give up the address of a tunnel that is away", release_reservation, arguments=ONE
        ),
        Command("status", "", "the daemon in a line of facts", status, changes=False, role=Role.ADMIN),
        Command(
            "settings",
            "[KEY]",
            "the configuration in force, or what of it begins so",
            settings,
            arguments=(0, 1),
            changes=False,
            role=Role.ADMIN,
        ),
        Command("reload", "", "read the configuration file again", reload, role=Role.ADMIN),
        Command("restart", "", "start the daemon again, tunnels and relays go along", restart, role=Role.ADMIN),
        Command(
            "shutdown",
            "[drain]",
            "end the daemon; with drain, let relays finish first",
            shut_down,
            arguments=(0, 1),
            role=Role.ADMIN,
        ),
        Command(
            "auth",
            "[SCRAM-SHA-256] BASE64",
            "prove knowledge of a credential's secret, in two steps",
            authenticate,
            arguments=(1, 2),
            role=None,
        ),
        Command(
            "help",
            "[verb]",
            "this list, or all that one verb takes",
            give_help,
            arguments=(0, 1),
            changes=False,
            role=None,
        ),
        Command("quit", "", "end this control connection; tunnels stay open", leave, changes=False, role=None),
    )
}


def executor(daemon: DaemonControl) -> Execute:
    """The function through which every face carries out requests."""

    async def execute(request: Request, caller: Requester) -> Reply:
        command = find_command(request.verb)
        check_role(caller.grant, command.role, command.verb)
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
