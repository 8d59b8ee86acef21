"""The verbs of the control protocol: one table, from verb to function.

Every interface (control protocol, XML-RPC, JSON), `help` and the test of the manual pages read `COMMANDS`; none has
logic of its own. Each row has the role that may use the verb.
"""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from tunneld.backends import BACKENDS
from tunneld.control.bans import ban, kick, list_bans, set_limits, unban
from tunneld.control.credentials import list_credentials
from tunneld.control.notes import Noted, note
from tunneld.control.verbs import (
    DaemonControl,
    close_tunnel,
    drain_tunnel,
    get_tunnel_address,
    join_tunnel,
    leave_tunnel,
    list_certificates,
    list_penalties,
    list_reservations,
    list_tunnels,
    open_tunnel,
    pardon,
    release_reservation,
    reload,
    renew_certificate,
    restart,
    settings,
    share_tunnel,
    show_tunnel,
    shut_down,
    status,
    trim_tunnel,
    try_certificate,
)
from tunneld.control.visits import invite_visitor, visit_tunnel
from tunneld.control.watches import WATCH_OPTIONS, watch_tunnels
from tunneld.directory.changing import CHANGEABLE
from tunneld.directory.reply import Execute, Reply
from tunneld.directory.requester import Requester
from tunneld.errors import UsageError
from tunneld.policy.access import Role, check_role
from tunneld.policy.options import OPTIONS, Option
from tunneld.wire.lines import ControlRequest, Item


@dataclass(frozen=True, slots=True)
class Command:
    """One row: the arguments of a verb, its summary, and the function that executes it."""

    verb: str
    usage: str
    summary: str
    run: Callable[[DaemonControl, ControlRequest, Requester], Awaitable[Reply]]
    arguments: tuple[int, int] = (0, 0)  # minimum, maximum
    options: Mapping[str, Option] = field(default_factory=dict)
    changes: bool = True  # False: read-only, safe to repeat, allowed with GET
    role: Role | None = Role.USER  # the role it requires; None: no authentication
    noted: Noted = Noted.NOTHING  # in the log and as an event


async def show_help(_daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """All verbs, or one verb with its options and backends."""
    if not request.args:
        return Reply(items=[{"verb": usage(command), "does": command.summary} for command in COMMANDS.values()])
    command = find_command(request.args[0])
    items: list[Item] = [{"verb": usage(command), "does": command.summary}]
    items += [{"option": f"{key}={row.takes}", "does": row.summary} for key, row in command.options.items()]
    if command.options is OPTIONS:
        items += [{"backend": name} for name in BACKENDS]
    return Reply(items=items)


async def refuse_auth(_daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """Refuse the verb: `ControlSession` handles it itself, and over HTTP it has no meaning."""
    raise UsageError("auth belongs to the control protocol; over HTTP, send an Authorization header")


async def end_session(_daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """End this control connection; tunnels stay open."""
    return Reply(text="bye", closing=True)


ONE_ARGUMENT = (1, 1)
TUNNEL_REFERENCE = "URI|ID"

COMMANDS: dict[str, Command] = {
    row.verb.lower(): row
    for row in (
        Command(
            "openTunnel",
            "[backend [described]] [key=value ...]",
            "open a tunnel; returns the server URI, to which the hidden server connects",
            open_tunnel,
            arguments=(0, 2),
            options=OPTIONS,
        ),
        Command(
            "getTunnelAddress",
            "URI",
            "return the client URI of a server URI",
            get_tunnel_address,
            arguments=ONE_ARGUMENT,
            changes=False,
        ),
        Command("list", "", "list all open tunnels", list_tunnels, changes=False),
        Command(
            "show",
            TUNNEL_REFERENCE,
            "show one tunnel and its visitors",
            show_tunnel,
            arguments=ONE_ARGUMENT,
            changes=False,
        ),
        Command(
            "close",
            f"{TUNNEL_REFERENCE} [keep]",
            "close a tunnel now; with keep, its address stays reserved",
            close_tunnel,
            arguments=(1, 2),
            noted=Noted.TUNNEL,
        ),
        Command(
            "drain",
            TUNNEL_REFERENCE,
            "accept no new visitors; close the tunnel after the last one",
            drain_tunnel,
            arguments=ONE_ARGUMENT,
            noted=Noted.TUNNEL,
        ),
        Command(
            "join",
            TUNNEL_REFERENCE,
            "serve an open tunnel again, for an agent that lost its control connection",
            join_tunnel,
            arguments=ONE_ARGUMENT,
        ),
        Command(
            "leave",
            TUNNEL_REFERENCE,
            "stop serving a tunnel; it is drained unless other agents share it",
            leave_tunnel,
            arguments=ONE_ARGUMENT,
        ),
        Command(
            "trim",
            f"{TUNNEL_REFERENCE} COUNT",
            "close idle server connections until COUNT are left",
            trim_tunnel,
            arguments=(2, 2),
        ),
        Command(
            "share",
            "NAME|URI|ID SECONDS|revoke",
            "return a link to a protected host name that expires; or revoke all links to it",
            share_tunnel,
            arguments=(2, 2),
            noted=Noted.TUNNEL,
        ),
        Command(
            "visitTunnel",
            "NAME@ID|TICKET",
            "make this connection a visitor of a private tunnel",
            visit_tunnel,
            arguments=ONE_ARGUMENT,
            role=None,  # with a ticket; else it requires the role user, as any other
        ),
        Command(
            "inviteVisitor",
            "NAME@ID TICKET SECONDS",
            "let a visitor without a credential ask for a private tunnel",
            invite_visitor,
            arguments=(3, 3),
        ),
        Command(
            "kick",
            f"{TUNNEL_REFERENCE} VISITOR|NETWORK",
            "disconnect a visitor of a tunnel, or all from an address or network",
            kick,
            arguments=(2, 2),
            noted=Noted.TUNNEL,
        ),
        Command(
            "set",
            f"{TUNNEL_REFERENCE} key=value [key=value ...]",
            "change limits of an open tunnel; none takes one away",
            set_limits,
            arguments=ONE_ARGUMENT,
            options=CHANGEABLE,
            noted=Noted.TUNNEL,
        ),
        Command(
            "watch",
            f"[{TUNNEL_REFERENCE}] [since=TIME]",
            "report events until a line is sent",
            watch_tunnels,
            arguments=(0, 1),
            options=WATCH_OPTIONS,
            changes=False,
        ),
        Command(
            "reservations",
            "[ADDRESS|NAME]",
            "list reserved addresses and their owners",
            list_reservations,
            arguments=(0, 1),
            changes=False,
        ),
        Command(
            "release",
            "ADDRESS|NAME",
            "drop the reservation of a tunnel that is not open",
            release_reservation,
            arguments=ONE_ARGUMENT,
            noted=Noted.RELAY,
        ),
        Command("status", "", "show the state of the daemon", status, changes=False, role=Role.ADMIN),
        Command(
            "settings",
            "[KEY]",
            "show the configuration in force, or the keys that begin with KEY",
            settings,
            arguments=(0, 1),
            changes=False,
            role=Role.ADMIN,
        ),
        Command(
            "penalties",
            "",
            "list addresses, and names at an address, that are blocked after failed logins",
            list_penalties,
            changes=False,
            role=Role.ADMIN,
        ),
        Command(
            "pardon",
            "ADDRESS",
            "forget the failed logins from an address, which lifts its penalties",
            pardon,
            arguments=ONE_ARGUMENT,
            role=Role.ADMIN,
            noted=Noted.RELAY,
        ),
        Command(
            "ban",
            "NETWORK [SECONDS]",
            "keep an address or network out for some time, and disconnect its visitors",
            ban,
            arguments=(1, 2),
            role=Role.ADMIN,
            noted=Noted.RELAY,
        ),
        Command(
            "unban",
            "NETWORK",
            "end a ban",
            unban,
            arguments=ONE_ARGUMENT,
            role=Role.ADMIN,
            noted=Noted.RELAY,
        ),
        Command(
            "credentials",
            "",
            "list the credentials, their limits, and how many tunnels each has open",
            list_credentials,
            changes=False,
            role=Role.ADMIN,
        ),
        Command("bans", "", "list the banned networks", list_bans, changes=False, role=Role.ADMIN),
        Command(
            "certificates",
            "",
            "list the certificates for host names, and when they are renewed",
            list_certificates,
            changes=False,
            role=Role.ADMIN,
        ),
        Command(
            "renew",
            "NAME",
            "order a new certificate for a host name now",
            renew_certificate,
            arguments=ONE_ARGUMENT,
            role=Role.ADMIN,
            noted=Noted.RELAY,
        ),
        Command(
            "tryCertificate",
            "NAME",
            "order a certificate that is thrown away, to find out what fails",
            try_certificate,
            arguments=ONE_ARGUMENT,
            role=Role.ADMIN,
        ),
        Command("reload", "", "read the configuration file again", reload, role=Role.ADMIN, noted=Noted.RELAY),
        Command(
            "restart",
            "",
            "restart the daemon; tunnels and connections are kept",
            restart,
            role=Role.ADMIN,
            noted=Noted.RELAY,
        ),
        Command(
            "shutdown",
            "[drain]",
            "stop the daemon; with drain, let connections finish first",
            shut_down,
            arguments=(0, 1),
            role=Role.ADMIN,
            noted=Noted.RELAY,
        ),
        Command(
            "auth",
            "[SCRAM-SHA-256] BASE64",
            "authenticate with the secret of a credential, in two steps",
            refuse_auth,
            arguments=(1, 2),
            role=None,
        ),
        Command(
            "help",
            "[verb]",
            "list all verbs, or describe one",
            show_help,
            arguments=(0, 1),
            changes=False,
            role=None,
        ),
        Command("quit", "", "close this control connection; tunnels stay open", end_session, changes=False, role=None),
    )
}


def executor(daemon: DaemonControl) -> Execute:
    """The function that executes the requests of every interface, on `daemon`."""

    async def execute(request: ControlRequest, caller: Requester) -> Reply:
        command = find_command(request.verb)
        check_role(caller.grant, command.role, command.verb, changes=command.changes)
        minimum, maximum = command.arguments
        if not minimum <= len(request.args) <= maximum:
            raise UsageError(f"usage: {usage(command)}")
        if request.options and not command.options:
            raise UsageError(f"{command.verb} does not accept {next(iter(request.options))}=; usage: {usage(command)}")
        if command.role is not None:
            await daemon.service.authority.check_login(caller.known_grant, caller.host)
        step = partial(daemon.service.turns.step, caller)
        if command.changes:  # it may wait for something, and no request is to wait for it
            async with step():
                pass
            await note(daemon, command.verb, command.noted, request, caller)
            reply = await command.run(daemon, request, caller)
        else:
            async with step():
                reply = await command.run(daemon, request, caller)
        return replace(reply, step=step)

    return execute


def find_command(verb: str) -> Command:
    """The row of a verb, case-insensitive. Raises `UsageError` that suggests the most similar verb."""
    command = COMMANDS.get(verb.lower())
    if command is None:
        near = difflib.get_close_matches(verb.lower(), COMMANDS, n=1)
        hint = f"did you mean {COMMANDS[near[0]].verb}? " if near else ""
        raise UsageError(f"unrecognized verb {verb!r}; {hint}help lists all verbs")
    return command


def usage(command: Command) -> str:
    """`show URI|ID`."""
    return f"{command.verb} {command.usage}".rstrip()
