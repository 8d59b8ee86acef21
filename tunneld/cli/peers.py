"""The options of `tunnel visit`, `identity`, `trust` and `invite`. The commands are in visit.py and identities.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tunneld.cli.access import add_relay_options, parsed
from tunneld.cli.common import Parser
from tunneld.policy.units import parse_duration, parse_positive_seconds

IDENTITY_FILE = "private key to use instead of that of `tunnel identity`"
CODE_LIFE = "10m"
"""How long a one-time code is valid by default: for reading it out on the telephone."""


def add_identity(parser: Parser) -> None:
    """Add the arguments of `tunnel identity`."""
    parser.add_argument(
        "action", choices=("show", "create"), nargs="?", help="show: print the id, as without it; create: create a key"
    )
    parser.add_argument("--identity", metavar="FILE", type=Path, help="file of the key")
    parser.set_defaults(command=_identity)


def add_trust(parser: Parser) -> None:
    """Add the commands `add`, `list` and `remove`."""
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, what in (
        ("add", "give a name to the id of another user"),
        ("list", "list the names and ids"),
        ("remove", "forget a name; running agents let this peer in no more"),
    ):
        action = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name != "list":
            action.add_argument("name", metavar="NAME", help="name of your choice for this peer")
        if name == "add":
            action.add_argument("id", metavar="ID", help="its id, as printed by `tunnel identity` there")
        action.set_defaults(command=_trust, action=name)


def add_invite(parser: Parser) -> None:
    """Add the arguments of `tunnel invite`."""
    parser.add_argument("name", metavar="NAME", help="name of the private tunnel, which an agent of this user serves")
    parser.add_argument(
        "--for",
        dest="seconds",
        metavar="TIME",
        type=partial(parsed, parse_duration),
        help=f"how long the code is valid: 90s, 10m, 1h or seconds (default: {CODE_LIFE})",
    )
    parser.add_argument("--identity", metavar="FILE", type=Path, help=IDENTITY_FILE)
    add_relay_options(parser)
    parser.set_defaults(command=_invite)


def add_visit(parser: Parser) -> None:
    """Add the arguments of `tunnel visit`."""
    add = parser.add_argument
    add(
        "words",
        metavar="NAME@PEER [HOST:]PORT",
        nargs="*",
        help="the tunnel: its name, and the name or id of its owner; the port of this machine to listen on (default: "
        "127.0.0.1, any free port)",
    )
    add("-W", dest="stdio", action="store_true", help="connect standard input and output, as a ProxyCommand of ssh")
    add(
        "--once",
        metavar="CODE",
        help="one session with a code of `tunnel invite`, in place of NAME@PEER; needs no key and no credential; -: "
        "read the code from standard input",
    )
    add("--identity", metavar="FILE", type=Path, help=IDENTITY_FILE)
    add(
        "--linger",
        metavar="SECONDS",
        type=partial(parsed, parse_positive_seconds),
        default=60.0,
        help="how long a connection may be idle after one direction has ended (default: %(default)g)",
    )
    add(
        "--idle",
        metavar="SECONDS",
        type=partial(parsed, parse_positive_seconds),
        default=600.0,
        help="end the session after this time without a connection; the next one begins another (default: %(default)g)",
    )
    add(
        "--wait",
        metavar="SECONDS",
        type=partial(parsed, parse_positive_seconds),
        default=10.0,
        help="how long a connection waits while the relay or the other end is away (default: %(default)g)",
    )
    verbosity = parser.add_mutually_exclusive_group()
    verbosity.add_argument("--json", action="store_true", help="print every event as JSON, one object per line")
    verbosity.add_argument("--quiet", action="store_true", help="print only the address and errors")
    add_relay_options(parser)
    parser.set_defaults(command=_visit)


ADD: dict[str, Callable[[Parser], None]] = {
    "visit": add_visit,
    "identity": add_identity,
    "trust": add_trust,
    "invite": add_invite,
}
"""What adds the arguments of each command."""


async def _identity(options: argparse.Namespace) -> int:
    from tunneld.cli import identities  # noqa: PLC0415 - --help does without

    return await identities.identity(options)


async def _trust(options: argparse.Namespace) -> int:
    from tunneld.cli import identities  # noqa: PLC0415 - as above

    return await identities.trust(options)


async def _invite(options: argparse.Namespace) -> int:
    from tunneld.cli import identities  # noqa: PLC0415 - as above

    return await identities.invite(options)


async def _visit(options: argparse.Namespace) -> int:
    from tunneld.cli import visit  # noqa: PLC0415 - as above

    return await visit.run(options)
