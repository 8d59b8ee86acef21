"""The options of `tunnel credential`. The commands themselves are in credential.py, which is slow to import."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from tunneld.cli.access import add_credential_options, parsed
from tunneld.cli.common import Parser
from tunneld.policy.access import GRANT_LIMITS

SSH_KEY = "public key (.pub) that authenticates this credential over SSH; may be repeated"
ROLE = (
    "open and manage its own tunnels (user), see everything and change nothing (viewer), or manage all tunnels and the"
    " daemon (admin); default: user"
)
ROLES = ("user", "viewer", "admin")

Run = Callable[[argparse.Namespace], Awaitable[int]]

ACTIONS = (
    ("add", "add a credential and print its new secret"),
    ("set", "change the role, the limits or the SSH keys of a credential"),
    ("remove", "remove a credential"),
    ("list", "list the credentials, without their secrets"),
    ("rotate", "replace the secret of a credential and print the new one"),
)


def add_credential(parser: Parser) -> None:
    """Add the commands `add`, `set`, `remove`, `list` and `rotate` with their options."""
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, what in ACTIONS:
        action = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False)
        config_help = "configuration file to edit or list (default: the one that tunneld would read)"
        action.add_argument("--config", type=Path, metavar="FILE", help=config_help)
        if name == "list":
            action.add_argument("--json", action="store_true", help="print JSON, one object per line")
        else:
            action.add_argument("name", metavar="NAME", help="name of the credential")
            add_credential_options(action.add_argument_group("credential options, for reloading the relay"))
        if name in {"add", "set"}:
            limits = action.add_argument_group("permissions and limits, see tunnel.toml(5)")
            _add_limits(limits, "user" if name == "add" else None)
        if name == "set":
            unset = "remove this limit, such as max_tunnels; may be repeated"
            limits.add_argument("--unset", metavar="KEY", action="append", default=[], choices=GRANT_LIMITS, help=unset)
        action.set_defaults(command=_command(name))


def _add_limits(group: argparse._ArgumentGroup, role: str | None) -> None:
    add = group.add_argument
    add("--ssh-key", metavar="FILE", type=Path, action="append", default=[], help=SSH_KEY)
    add("--role", choices=ROLES, default=role, help=ROLE if role else ROLE.partition("; default")[0])
    for key, limit in GRANT_LIMITS.items():
        flag = f"--{key.replace('_', '-')}"
        if limit.is_list:
            add(flag, metavar=limit.takes, action="append", help=f"{limit.summary}; may be repeated")
        else:
            add(flag, metavar=limit.takes, type=partial(parsed, limit.read), help=limit.summary)


def _command(name: str) -> Run:
    async def run(options: argparse.Namespace) -> int:
        from tunneld.cli import credential  # noqa: PLC0415 - --help does without

        actions = {
            "add": credential.add,
            "set": credential.change,
            "remove": credential.remove,
            "list": credential.list_credentials,
            "rotate": credential.rotate,
        }
        return await actions[name](options)

    return run
