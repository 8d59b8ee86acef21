"""`tunnel`: the command line of users and operators, tunnel(1)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from tunneld.cli.commands import VERBS, add_top, add_verb
from tunneld.cli.common import Parser, run

EXPOSE = "make a local server reachable until interrupted"
UP = "make the local servers in a configuration file reachable"
TOP = "show the rates of tunnels and visitors, live"
CREDENTIAL = "manage the credentials of the relay on this machine"
PRIVATE = {
    "visit": "connect to a private tunnel",
    "identity": "print the id of this user's key for private tunnels, or create the key",
    "trust": "manage the ids of other users' keys, by names of your choice",
    "invite": "print a one-time code that lets one person without a key into a private tunnel",
}
"""The commands for private tunnels, whose options are in peers.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tunnel` with these arguments, or with those of the process. Returns the exit status."""
    return run("tunnel", lambda: _tunnel(_made().parse_args(argv)))


def parser() -> Parser:
    """Make the parser with the options of all commands, for shell completion and the test of the manual page."""
    made = _made()
    made.fill_all()
    return made


def _made() -> Parser:
    made = Parser(
        prog="tunnel",
        description="Make a server behind NAT or a firewall reachable through a relay, and manage tunnels.",
        epilog="Exit statuses are those of sysexits(3). See tunnel(1) for details.",
        allow_abbrev=False,
    )
    made.add_common_options()
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    fills: list[tuple[str, str, Callable[[Parser], None]]] = [
        ("expose", EXPOSE, _add_expose),
        ("up", UP, _add_up),
        ("credential", CREDENTIAL, _add_credential),
        *[(name, summary, partial(_add_private, name)) for name, summary in PRIVATE.items()],
        ("top", TOP, add_top),
        *[(verb.name, verb.summary, partial(add_verb, verb=verb)) for verb in VERBS],
    ]
    for name, summary, fill in fills:
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        command.filled_by = fill
    return made


def _add_expose(parser: Parser) -> None:
    from tunneld.cli.expose_options import add_expose  # noqa: PLC0415 - for the command that runs

    add_expose(parser)


def _add_up(parser: Parser) -> None:
    from tunneld.cli.expose_options import add_up  # noqa: PLC0415 - as above

    add_up(parser)


def _add_credential(parser: Parser) -> None:
    from tunneld.cli.keyring import add_credential  # noqa: PLC0415 - as above

    add_credential(parser)


def _add_private(name: str, parser: Parser) -> None:
    from tunneld.cli.peers import ADD  # noqa: PLC0415 - as above

    ADD[name](parser)


def _tunnel(options: argparse.Namespace) -> int:
    import trio  # noqa: PLC0415 - --help and --version do without

    status: int = trio.run(options.command, options)
    return status
