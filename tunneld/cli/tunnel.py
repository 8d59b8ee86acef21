"""`tunnel`: the command line of users and operators, tunnel(1)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tunneld.agent.health import HEALTHY_AFTER, INTERVAL, MAX_CHECKS, PATH, TIMEOUT, UNHEALTHY_AFTER, UnhealthyPolicy
from tunneld.agent.pool import PARKED_KEEPALIVE, PARKED_MAX_AGE
from tunneld.agent.shutdown import DRAIN_WITHIN
from tunneld.cli.access import add_relay_options, checked_by, parsed_by, positive_seconds, seconds_or_zero
from tunneld.cli.common import Parser, run
from tunneld.cli.keyring import CREDENTIAL, add_credential
from tunneld.cli.verbs import VERBS, Verb, carry_out
from tunneld.policy.options import NAMES, OPTIONS, TUNNEL, VISITORS, parse_boolean, parse_count
from tunneld.policy.units import parse_duration

LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
"""As in config/certificates.py, which --help does without."""
MAX_POOL = 100_000
"""Largest number of idle connections for --pool and --max-pool."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tunnel` with these arguments, or with those of the process. Returns the exit status."""
    return run("tunnel", lambda: _tunnel(parser().parse_args(argv)))


def parser() -> Parser:
    """Make the parser. Shell completion and the test of the manual page use it, too."""
    made = Parser(
        prog="tunnel",
        description="Make a server behind NAT or a firewall reachable through a relay, and manage tunnels.",
        epilog="Exit statuses are those of sysexits(3). See tunnel(1) for details.",
    )
    made.add_common_options()
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    _add_expose(commands.add_parser("expose", help=EXPOSE, description=_sentence(EXPOSE)))
    _add_up(commands.add_parser("up", help=UP, description=_sentence(UP)))
    add_credential(commands.add_parser("credential", help=CREDENTIAL, description=_sentence(CREDENTIAL)))
    for verb in VERBS:
        _add_verb(commands.add_parser(verb.name, help=verb.summary, description=_sentence(verb.summary)), verb)
    return made


EXPOSE = "make a local server reachable until interrupted"

UP = "make the local servers in a configuration file reachable"


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _tunnel(options: argparse.Namespace) -> int:
    import trio  # noqa: PLC0415 - --help and --version do without

    status: int = trio.run(options.command, options)
    return status


def _add_verb(parser: Parser, verb: Verb) -> None:
    for name, metavar, what in verb.arguments:
        nargs = verb.nargs if name == verb.arguments[-1][0] else None
        parser.add_argument(name, metavar=metavar, nargs=nargs, help=what)
    if verb.name == "shutdown":
        parser.add_argument("--drain", action="store_true", help="let open connections finish first")
    if verb.name == "drain":
        help_text = "wait until the tunnel has closed, and print the number of remaining visitors"
        parser.add_argument("--wait", action="store_true", help=help_text)
    if verb.name == "share":
        ways = parser.add_mutually_exclusive_group(required=True)
        help_text = "how long the link is valid: 2h, 30m, 7d or seconds"
        ways.add_argument("--for", dest="seconds", metavar="TIME", type=parsed_by(parse_duration), help=help_text)
        ways.add_argument("--revoke", action="store_true", help="make all links to it void")
    if verb.name == "close":
        help_text = "keep the address reserved for the next tunnel of the same name and owner"
        parser.add_argument("--keep", action="store_true", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")
    add_relay_options(parser)
    parser.set_defaults(command=partial(carry_out, verb))


async def _expose(options: argparse.Namespace) -> int:
    from tunneld.cli import expose  # noqa: PLC0415 - --help does without

    return await expose.run(options)


def _add_expose(parser: Parser) -> None:
    parser.add_argument("target", metavar="TARGET", help="the local server: PORT, HOST:PORT or unix:PATH")
    add_relay_options(parser)
    _add_output_options(parser.add_argument_group("output options"))
    _add_tunnel_options(parser.add_argument_group("tunnel options"))
    names = parser.add_argument_group("host names, if the relay has them")
    _add_names_options(names)
    _add_https_options(names)
    limits = parser.add_argument_group("limits for visitors, see TUNNEL OPTIONS in tunneld-control(7)")
    _add_table_options(limits, VISITORS)
    _add_health_options(parser.add_argument_group("health checks of the local server"))
    parser.set_defaults(command=_expose)


async def _up(options: argparse.Namespace) -> int:
    from tunneld.cli import up  # noqa: PLC0415 - as above

    return await up.run(options)


def _add_up(parser: Parser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="exposures to serve (default: all in the file)")
    file_help = "configuration file (default: ~/.config/tunneld/expose.toml)"
    parser.add_argument("--file", metavar="FILE", type=Path, help=file_help)
    parser.add_argument("--check", action="store_true", help="report errors in the file and exit")
    _add_verbosity(parser.add_argument_group("output options"))
    parser.set_defaults(command=_up)


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    scheme = group.add_mutually_exclusive_group()
    http_help, https_help = "print the address as http://HOST:PORT/", "print the address as https://HOST:PORT/"
    scheme.add_argument("--http", dest="scheme", action="store_const", const="http", help=http_help)
    scheme.add_argument("--https", dest="scheme", action="store_const", const="https", help=https_help)
    _add_verbosity(group)


def _add_verbosity(group: argparse._ArgumentGroup) -> None:
    verbosity = group.add_mutually_exclusive_group()
    verbosity.add_argument("--json", action="store_true", help="print every event as JSON, one object per line")
    verbosity.add_argument("--quiet", action="store_true", help="print only addresses and errors")


def _add_tunnel_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    _add_table_options(group, TUNNEL)
    _add_tunnel_times(group)
    add(
        "--backend",
        choices=("webmux", "tcp", "egtp"),
        help="one connection to the relay for all visitors (webmux), the same with messages between two keys (egtp), "
        "or one for each (tcp); default: webmux if the relay and this system support it",
    )
    add(
        "--secure",
        choices=("yes", "key", "no"),
        help="protection of tcp connections: TLS and a key (yes), only a key (key) or none (no); "
        "default: yes if the control connection uses TLS, else key, or no if the relay is on this machine",
    )
    add(
        "--pool",
        metavar="COUNT",
        type=parsed_by(partial(parse_count, maximum=MAX_POOL)),
        default=8,
        help="idle connections to keep with tcp when there is no load (default: %(default)s)",
    )
    add(
        "--max-pool",
        metavar="COUNT",
        type=parsed_by(partial(parse_count, maximum=MAX_POOL)),
        default=200,
        help="idle connections to keep with tcp under load (default: %(default)s)",
    )
    add(
        "--pool-keepalive",
        metavar="SECONDS",
        type=positive_seconds,
        default=PARKED_KEEPALIVE,
        help="with tcp, probe the relay when an idle connection has been silent for this long (default: %(default)g)",
    )
    add(
        "--pool-max-age",
        metavar="SECONDS",
        type=positive_seconds,
        default=PARKED_MAX_AGE,
        help="with tcp, replace an idle connection after this time (default: %(default)g)",
    )
    add(
        "--proxy-protocol",
        action="store_true",
        help="send the visitor's address to the local server in a PROXY protocol header, version 2",
    )


def _add_tunnel_times(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--linger",
        metavar="SECONDS",
        type=positive_seconds,
        default=60.0,
        help="how long a connection may be idle after one direction has ended (default: %(default)g)",
    )
    add(
        "--drain-timeout",
        metavar="SECONDS",
        type=seconds_or_zero,
        default=DRAIN_WITHIN,
        help="how long visitors may finish after a signal to stop (default: %(default)g)",
    )


def _add_table_options(group: argparse._ArgumentGroup, name: str) -> None:
    """Add the flags of one group of `OPTIONS`. Their values go to the relay as they were typed."""
    for key, option in OPTIONS.items():
        if option.group == name and option.read is parse_boolean:
            group.add_argument(option.flag_of(key), dest=key, action="store_true", help=option.summary)
        elif option.group == name:
            read = checked_by(option.read)
            group.add_argument(option.flag_of(key), dest=key, metavar=option.takes, type=read, help=option.summary)


def _add_names_options(group: argparse._ArgumentGroup) -> None:
    _add_table_options(group, NAMES)
    group.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        action="append",
        help="let in visitors with this user name and password; repeat for more; link: only visitors with a link of "
        "`tunnel share`. Other users of this machine can see it: prefer --auth-file",
    )
    group.add_argument(
        "--auth-file", metavar="FILE", type=Path, help="file with lines USER:PASSWORD, for visitors of host names"
    )


def _add_https_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--https-here",
        action="store_true",
        help="end TLS in this agent, which gets the certificate itself: its key never leaves this machine",
    )
    add(
        "--acme-directory",
        metavar="URL",
        default=LETS_ENCRYPT,
        help="authority that issues the certificate of --https-here (default: Let's Encrypt)",
    )
    add("--acme-ca-file", metavar="FILE", help="trust the certificate authorities in this file for that URL")
    add("--acme-agree", action="store_true", help="agree to the terms of service of that authority (required)")
    add("--acme-contact", metavar="ADDRESS", help="e-mail address for the authority (default: none)")


def _add_health_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--health",
        choices=("tcp", "http"),
        help="check that the local server accepts a connection (tcp) or answers a GET request (http)",
    )
    add(
        "--health-path",
        metavar="PATH",
        type=_path,
        default=PATH,
        help="path to request with --health http (default: %(default)s)",
    )
    for option, default, what in (
        ("interval", INTERVAL, "time between checks"),
        ("timeout", TIMEOUT, "time limit for a check"),
    ):
        name, help_text = f"--health-{option}", f"{what} (default: %(default)g)"
        add(name, metavar="SECONDS", type=positive_seconds, default=default, help=help_text)
    for option, count, what in (
        ("unhealthy", UNHEALTHY_AFTER, "failed checks in a row after which it is unhealthy"),
        ("healthy", HEALTHY_AFTER, "successful checks in a row after which it is healthy again"),
    ):
        help_text = f"{what} (default: %(default)s)"
        add(
            f"--{option}-after",
            metavar="COUNT",
            type=parsed_by(partial(parse_count, maximum=MAX_CHECKS)),
            default=count,
            help=help_text,
        )
    add(
        "--unhealthy",
        choices=[policy.value for policy in UnhealthyPolicy],
        default=UnhealthyPolicy.ANSWER.value,
        help="while unhealthy, answer visitors with status 503 or disconnect them (answer), serve them as usual and "
        "report the failure (tell), or leave them to other agents of the tunnel (withdraw); default: %(default)s",
    )


def _path(text: str) -> str:
    if not (text.startswith("/") and text.isascii() and text.isprintable() and " " not in text):
        raise argparse.ArgumentTypeError(
            f"not a path for an HTTP request (must start with / and have no spaces): {text!r}"
        )
    return text
