"""The commands of `tunnel` that are verbs of the control protocol: names, arguments and options. verbs.py runs them."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tunneld.cli.common import Parser

REFERENCE = ("ref", "REF", "id, name, URI, port or host name of the tunnel, as shown by `tunnel list`")


DEFAULT_INTERVAL, MIN_INTERVAL, MAX_INTERVAL = 2.0, 0.5, 3600.0
"""Seconds between two requests of `tunnel top`. More than two a second would be a load, and unreadable."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A command of `tunnel`: its verb in the control protocol, and its arguments. verbs.py has its function."""

    name: str
    wire: str  # the verb of tunneld-control(7)
    summary: str
    arguments: Sequence[tuple[str, str, str]] = ()  # name, metavar, help
    nargs: str | None = None  # of the last argument


VERBS = (
    Verb(
        "open",
        "openTunnel",
        "open a tunnel and print its server URI, to which the local server or its agent connects",
        [("words", "backend | key=value", "the backend (default: tcp) and tunnel options, see tunneld-control(7)")],
        nargs="*",
    ),
    Verb(
        "address",
        "getTunnelAddress",
        "print the public address (client URI) that belongs to a server URI",
        [("uri", "URI", "the server URI")],
    ),
    Verb("list", "list", "list all open tunnels"),
    Verb("show", "show", "show one tunnel and its visitors", [REFERENCE]),
    Verb("close", "close", "close a tunnel now and cut its connections", [REFERENCE]),
    Verb(
        "drain",
        "drain",
        "accept no new visitors, and close a tunnel when its last visitor has left",
        [REFERENCE],
    ),
    Verb(
        "trim",
        "trim",
        "close idle server connections of a tunnel until COUNT are left",
        [REFERENCE, ("count", "COUNT", "number of connections to keep")],
    ),
    Verb(
        "reservations",
        "reservations",
        "list the addresses that are reserved for tunnels with a name",
        [("which", "ADDRESS|NAME", "show only the reservation of this port, host name or tunnel name")],
        nargs="?",
    ),
    Verb(
        "release",
        "release",
        "drop the reservation of a tunnel that is not open",
        [("which", "ADDRESS|NAME", "port, host name or tunnel name of the reservation")],
    ),
    Verb(
        "share",
        "share",
        "print a link that lets visitors into a host name with a password, until it expires",
        [("name", "NAME", "label or host name of the tunnel, or id, URI or port, as shown by `tunnel list`")],
    ),
    Verb(
        "kick",
        "kick",
        "disconnect a visitor of a tunnel, or all from an address or network",
        [REFERENCE, ("visitor", "VISITOR", "the visitor as shown by `tunnel show`, or an address or network")],
    ),
    Verb(
        "set",
        "set",
        "change limits of an open tunnel",
        [REFERENCE, ("words", "key=value", "limits, as in TUNNEL OPTIONS of tunneld-control(7); none: no limit")],
        nargs="+",
    ),
    Verb("watch", "watch", "print events of all tunnels, or of one, as they happen", [REFERENCE], nargs="?"),
    Verb("status", "status", "print facts about the daemon"),
    Verb(
        "settings",
        "settings",
        "print the configuration in force",
        [("key_path", "KEY", "print only keys that begin with KEY, such as control.max")],
        nargs="?",
    ),
    Verb(
        "penalties",
        "penalties",
        "list the addresses, and the names at an address, that are blocked after failed logins",
    ),
    Verb(
        "pardon",
        "pardon",
        "unblock an address: forget the failed logins from it",
        [("address", "ADDRESS", "the address, as shown by `tunnel penalties`")],
    ),
    Verb(
        "ban",
        "ban",
        "keep an address or network away from all tunnels for some time, and disconnect its visitors",
        [("network", "NETWORK", "the address or network")],
    ),
    Verb("unban", "unban", "end a ban", [("network", "NETWORK", "the network, as shown by `tunnel bans`")]),
    Verb("bans", "bans", "list the banned networks"),
    Verb("reload", "reload", "make the daemon read its configuration file again"),
    Verb("restart", "restart", "restart the daemon, keeping tunnels and tcp connections"),
    Verb("shutdown", "shutdown", "stop the daemon"),
)


def add_verb(parser: Parser, verb: Verb) -> None:
    """Add the arguments and options of a verb."""
    from tunneld.cli.access import add_relay_options  # noqa: PLC0415 - for the command that runs

    for name, metavar, what in verb.arguments:
        nargs = verb.nargs if name == verb.arguments[-1][0] else None
        parser.add_argument(name, metavar=metavar, nargs=nargs, help=what)
    match verb.name:
        case "shutdown":
            parser.add_argument("--drain", action="store_true", help="let open connections finish first")
        case "drain":
            help_text = "wait until the tunnel has closed, and print the number of remaining visitors"
            parser.add_argument("--wait", action="store_true", help=help_text)
        case "share":
            _add_share(parser)
        case "list":
            help_text = "print server URIs with their keys, and all other columns"
            parser.add_argument("--keys", action="store_true", help=help_text)
        case "ban":
            _add_ban(parser)
        case "watch":
            _add_watch(parser)
        case "close":
            help_text = "keep the address reserved for the next tunnel of the same name and owner"
            parser.add_argument("--keep", action="store_true", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")
    add_relay_options(parser)
    parser.set_defaults(command=_command(verb.name))


def add_top(parser: Parser) -> None:
    """Add the arguments and options of `tunnel top`."""
    from tunneld.cli.access import add_relay_options, parsed  # noqa: PLC0415 - as above
    from tunneld.cli.top_rows import DEFAULT_SORT, SORTS  # noqa: PLC0415 - as above

    name, metavar, _ = REFERENCE
    parser.add_argument(name, metavar=metavar, nargs="?", help="show the visitors of this tunnel")
    parser.add_argument("--once", action="store_true", help="print the rates of one interval, and exit")
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=partial(parsed, parse_interval),
        default=DEFAULT_INTERVAL,
        help="time between two requests to the relay (default: %(default)g)",
    )
    parser.add_argument("--sort", choices=SORTS, default=DEFAULT_SORT, help="column to sort by (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line, with --once")
    add_relay_options(parser)
    parser.set_defaults(command=_top)


def parse_interval(text: str) -> float:
    """Read the value of `--interval`. Raises `ValueError`."""
    from tunneld.policy.units import parse_positive_seconds  # noqa: PLC0415 - as above

    value = parse_positive_seconds(text)
    if not MIN_INTERVAL <= value <= MAX_INTERVAL:
        raise ValueError(f"not a number of seconds from {MIN_INTERVAL:g} to {MAX_INTERVAL:g}")
    return value


async def _top(options: argparse.Namespace) -> int:
    from tunneld.cli import top  # noqa: PLC0415 - --help does without

    return await top.run(options)


def _add_share(parser: Parser) -> None:
    from tunneld.cli.access import parsed  # noqa: PLC0415 - as above
    from tunneld.policy.units import parse_duration  # noqa: PLC0415 - as above

    ways = parser.add_mutually_exclusive_group(required=True)
    help_text = "how long the link is valid: 2h, 30m, 7d or seconds"
    ways.add_argument("--for", dest="seconds", metavar="TIME", type=partial(parsed, parse_duration), help=help_text)
    ways.add_argument("--revoke", action="store_true", help="make all links to it void")


def _add_ban(parser: Parser) -> None:
    from tunneld.cli.access import parsed  # noqa: PLC0415 - as above
    from tunneld.policy.units import parse_duration  # noqa: PLC0415 - as above

    help_text = "how long: 30m, 7d or seconds, at most 30d (default: 1h)"
    parser.add_argument("--for", dest="seconds", metavar="TIME", type=partial(parsed, parse_duration), help=help_text)


def _add_watch(parser: Parser) -> None:
    from tunneld.cli.access import parsed  # noqa: PLC0415 - as above
    from tunneld.policy.units import parse_duration  # noqa: PLC0415 - as above

    help_text = "print first the events of the last 30m, 2h, 7d or seconds, as far as the relay keeps them"
    parser.add_argument("--since", metavar="TIME", type=partial(parsed, parse_duration), help=help_text)


def _command(name: str) -> Callable[[argparse.Namespace], Awaitable[int]]:
    async def run(options: argparse.Namespace) -> int:
        from tunneld.cli.verbs import carry_out  # noqa: PLC0415 - --help does without

        return await carry_out(name, options)

    return run
