"""The options of `tunnel credential`, apart from what it does, so that `--help` need not wait for that."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path

from tunneld.cli.access import add_credential_options, positive_seconds
from tunneld.cli.common import Parser

CREDENTIAL = "who may use the relay on this machine: edit its tunnel.toml, and reload it"
SSH_KEY = "a public key (.pub) that lets in by ssh; may be given several times"
ROLES = ("user", "admin")

Run = Callable[[argparse.Namespace], Awaitable[int]]

ACTIONS = (
    ("add", "add one, and print its new secret"),
    ("remove", "take one away"),
    ("list", "the credentials, a line each, without their secrets"),
    ("rotate", "give one a new secret, and print that"),
)


def add_credential(parser: Parser) -> None:
    """`add`, `remove`, `list`, `rotate`, and what they take."""
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, what in ACTIONS:
        action = actions.add_parser(name, help=what, description=what + ".")
        action.add_argument(
            "--config", type=Path, metavar="FILE", help="the file, else the one that tunneld would read"
        )
        if name == "list":
            action.add_argument("--json", action="store_true", help="print JSON, one object a line")
        else:
            action.add_argument("name", metavar="NAME", help="the name of the credential")
            add_credential_options(action.add_argument_group("as whom to reload the relay"))
        if name == "add":
            _add_limits(action.add_argument_group("what it may do"))
        action.set_defaults(command=_command(name))


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--ssh-key", metavar="FILE", type=Path, action="append", default=[], help=SSH_KEY)
    add("--role", choices=ROLES, default="user", help="its own tunnels (user), or all of them and the daemon (admin)")
    for option, metavar, what in (
        ("backends", "NAME", "what it may open"),
        ("ports", "RANGE", "ports it may ask for"),
        ("networks", "NETWORK", "where it may be used from"),
        ("server-from", "NETWORK", "where its hidden servers may connect from"),
    ):
        add(f"--{option}", metavar=metavar, action="append", help=f"{what}; may be given several times")
    add("--max-tunnels", metavar="COUNT", type=int, help="how many it may have open")
    add("--max-visitors", metavar="COUNT", type=int, help="how many each of its tunnels may relay at once")
    add("--max-ttl", metavar="SECONDS", type=positive_seconds, help="how long its tunnels may last")
    add("--bandwidth", metavar="OCTETS", type=int, help="octets per second that each of its tunnels may relay")
    add("--quota", metavar="OCTETS", type=int, help="octets that each of its tunnels may relay in all")


def _command(name: str) -> Run:
    async def run(options: argparse.Namespace) -> int:
        from tunneld.cli import credential  # noqa: PLC0415 - --help does without

        actions = {
            "add": credential.add,
            "remove": credential.remove,
            "list": credential.list_credentials,
            "rotate": credential.rotate,
        }
        return await actions[name](options)

    return run
