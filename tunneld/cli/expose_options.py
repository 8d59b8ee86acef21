"""The options of `tunnel expose` and `tunnel up`. The commands themselves, in expose.py and up.py, need Trio."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tunneld.agent.keys import HEALTH, INSPECTOR, KEYS, PRIVATE
from tunneld.agent.kinds import Boolean, Several, Switch, Words
from tunneld.cli.access import add_relay_options, parsed
from tunneld.cli.common import Parser
from tunneld.policy.options import NAMES, TUNNEL, VISITORS

GROUPS = {
    TUNNEL: "tunnel options",
    NAMES: "host names, if the relay has them",
    VISITORS: "limits for visitors, see TUNNEL OPTIONS in tunneld-control(7)",
    PRIVATE: "private tunnels",
    INSPECTOR: "inspector: a page with the HTTP requests that pass",
    HEALTH: "health checks of the local server",
}
"""The titles of the groups of `KEYS`, in the order of the help."""


def add_expose(parser: Parser) -> None:
    """Add the arguments and options of `tunnel expose`."""
    parser.add_argument("target", metavar="TARGET", help=KEYS["target"].summary)
    add_relay_options(parser)
    _add_output_options(parser.add_argument_group("output options"))
    _add_probes(parser)
    for name, title in GROUPS.items():
        _add_keys(parser.add_argument_group(title), name)
    parser.set_defaults(command=_expose)


def add_up(parser: Parser) -> None:
    """Add the arguments and options of `tunnel up`."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="exposures to serve (default: all in the file)")
    file_help = "configuration file (default: ~/.config/tunneld/expose.toml)"
    parser.add_argument("--file", metavar="FILE", type=Path, help=file_help)
    parser.add_argument("--check", action="store_true", help="report errors in the file and exit")
    _add_verbosity(parser.add_argument_group("output options"))
    _add_probes(parser)
    parser.set_defaults(command=_up)


def _add_keys(group: argparse._ArgumentGroup, name: str) -> None:
    """Add the flags of the rows of `KEYS` in this group."""
    for key, row in KEYS.items():
        if row.group != name:
            continue
        flag, kind = row.flag or f"--{key.replace('_', '-')}", row.kind
        if isinstance(kind, Boolean):
            group.add_argument(flag, dest=key, action="store_true", help=row.summary)
        elif isinstance(kind, Switch):
            read = partial(parsed, kind.from_text)
            group.add_argument(flag, dest=key, nargs="?", const="", metavar=row.takes, type=read, help=row.summary)
        elif isinstance(kind, Words):
            group.add_argument(flag, dest=key, choices=kind.words, default=row.default, help=row.summary)
        else:
            group.add_argument(
                flag,
                dest=key,
                metavar=row.takes,
                type=partial(parsed, kind.from_text),
                action="append" if isinstance(kind, Several) and kind.read is None else "store",
                default=row.default,
                help=row.summary,
            )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    scheme = group.add_mutually_exclusive_group()
    http_help, https_help = "print the address as http://HOST:PORT/", "print the address as https://HOST:PORT/"
    scheme.add_argument("--http", dest="scheme", action="store_const", const="http", help=http_help)
    scheme.add_argument("--https", dest="scheme", action="store_const", const="https", help=https_help)
    group.add_argument("--qr", action="store_true", help="print the address as a QR code, too")
    _add_verbosity(group)


def _add_probes(parser: Parser) -> None:
    group = parser.add_argument_group("probes")
    file_help = "file that exists while visitors can come, with the addresses"
    group.add_argument("--ready-file", metavar="FILE", type=Path, help=file_help)
    status_help = "serve /healthz, /readyz and /metrics over HTTP here, by default on 127.0.0.1"
    group.add_argument("--status-address", metavar="[ADDRESS:]PORT", help=status_help)


def _add_verbosity(group: argparse._ArgumentGroup) -> None:
    verbosity = group.add_mutually_exclusive_group()
    verbosity.add_argument("--json", action="store_true", help="print every event as JSON, one object per line")
    verbosity.add_argument("--quiet", action="store_true", help="print only addresses and errors")


async def _expose(options: argparse.Namespace) -> int:
    from tunneld.cli import expose  # noqa: PLC0415 - --help does without

    return await expose.run(options)


async def _up(options: argparse.Namespace) -> int:
    from tunneld.cli import up  # noqa: PLC0415 - as above

    return await up.run(options)
