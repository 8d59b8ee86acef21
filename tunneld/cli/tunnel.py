"""`tunnel`: the person's command line, tunnel(1)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tunneld.agent.health import HEALTHY_AFTER, INTERVAL, MAX_CHECKS, PATH, TIMEOUT, UNHEALTHY_AFTER, UnhealthyPolicy
from tunneld.agent.shutdown import DRAIN_WITHIN
from tunneld.cli.access import add_relay_options, positive_seconds, some_seconds
from tunneld.cli.common import Parser, run
from tunneld.cli.keyring import CREDENTIAL, add_credential
from tunneld.cli.verbs import VERBS, Verb, carry_out
from tunneld.policy.options import parse_client_port, parse_count

MAX_POOL = 100_000
"""Connections that --pool and --max-pool may park."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tunnel` with the arguments given, else those of the process. Returns the exit status."""
    return run("tunnel", lambda: _tunnel(parser().parse_args(argv)))


def parser() -> Parser:
    """The parser; also for completion and for the test that reads the manual."""
    made = Parser(
        prog="tunnel",
        description="Make a server behind NAT or a firewall reachable through a tunnel, and look after tunnels.",
        epilog="Exit statuses are those of sysexits(3). See tunnel(1).",
    )
    made.add_common_options()
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    _add_expose(commands.add_parser("expose", help=EXPOSE, description=EXPOSE + "."))
    _add_up(commands.add_parser("up", help=UP, description=UP + "."))
    add_credential(commands.add_parser("credential", help=CREDENTIAL, description=CREDENTIAL + "."))
    for verb in VERBS:
        _add_verb(commands.add_parser(verb.name, help=verb.summary, description=verb.summary + "."), verb)
    return made


EXPOSE = "make a local server reachable: open a tunnel, serve its visitors, come back after a loss"

UP = "make several local servers reachable, as a file says"


def _tunnel(options: argparse.Namespace) -> int:
    import trio  # noqa: PLC0415 - --help and --version do without

    status: int = trio.run(options.command, options)
    return status


def _add_verb(parser: Parser, verb: Verb) -> None:
    for name, metavar, what in verb.arguments:
        nargs = verb.nargs if name == verb.arguments[-1][0] else None
        parser.add_argument(name, metavar=metavar, nargs=nargs, help=what)
    if verb.name == "shutdown":
        parser.add_argument("--drain", action="store_true", help="let relays finish first")
    if verb.name == "drain":
        parser.add_argument("--wait", action="store_true", help="say how many visitors are left until none is")
    if verb.name == "close":
        parser.add_argument("--keep", action="store_true", help="keep its address for one of the same name")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    add_relay_options(parser)
    parser.set_defaults(command=partial(carry_out, verb))


async def _expose(options: argparse.Namespace) -> int:
    from tunneld.cli import expose  # noqa: PLC0415 - --help does without

    return await expose.run(options)


def _add_expose(parser: Parser) -> None:
    parser.add_argument("target", metavar="TARGET", help="the local server: PORT, HOST:PORT or unix:PATH")
    add_relay_options(parser)
    _add_output_options(parser.add_argument_group("what is printed"))
    _add_tunnel_options(parser.add_argument_group("the tunnel"))
    _add_visitor_options(parser.add_argument_group("its visitors, as openTunnel of tunneld-control(7) has them"))
    _add_health_options(parser.add_argument_group("checks of the local server"))
    parser.set_defaults(command=_expose)


async def _up(options: argparse.Namespace) -> int:
    from tunneld.cli import up  # noqa: PLC0415 - as above

    return await up.run(options)


def _add_up(parser: Parser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="of the exposures in the file; else all of them")
    parser.add_argument("--file", metavar="FILE", type=Path, help="the file, else ~/.config/tunneld/expose.toml")
    parser.add_argument("--check", action="store_true", help="say what is wrong with the file, and exit")
    _add_amount(parser.add_argument_group("what is printed"))
    parser.set_defaults(command=_up)


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    scheme = group.add_mutually_exclusive_group()
    scheme.add_argument("--http", dest="scheme", action="store_const", const="http", help="the address as http://.../")
    scheme.add_argument("--https", dest="scheme", action="store_const", const="https", help="the same as https://.../")
    _add_amount(group)


def _add_amount(group: argparse._ArgumentGroup) -> None:
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--json", action="store_true", help="every event as a JSON object, one a line")
    amount.add_argument("--quiet", action="store_true", help="only addresses, and what goes wrong")


def _add_tunnel_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--name", metavar="NAME", help="a word for people, and by which an agent has its address back")
    add("--share", action="store_true", help="serve the tunnel of this name together with other agents")
    port_help = "the port that clients connect to, where the relay allows it"
    add("--port", dest="client_port", metavar="PORT", type=_reads(parse_client_port), help=port_help)
    add("--ttl", metavar="SECONDS", type=positive_seconds, help="close the tunnel after this time and exit")
    add(
        "--idle-timeout",
        metavar="SECONDS",
        type=positive_seconds,
        help="close the tunnel when no byte has moved for this time and exit",
    )
    add(
        "--pairing-timeout",
        metavar="SECONDS",
        type=positive_seconds,
        help="how long a visitor waits at the relay while the agent takes none",
    )
    add(
        "--linger",
        metavar="SECONDS",
        type=positive_seconds,
        default=60.0,
        help="how long a half-closed relay may be silent (%(default)g)",
    )
    add(
        "--drain-timeout",
        metavar="SECONDS",
        type=some_seconds,
        default=DRAIN_WITHIN,
        help="how long visitors may finish when the agent is told to end (%(default)g)",
    )
    add(
        "--backend",
        choices=("webmux", "tcp"),
        help="one connection for all visitors (webmux), or one for each (tcp); else webmux where the relay has it",
    )
    add(
        "--secure",
        choices=("yes", "key", "no"),
        help="of tcp: in TLS and with a key, with a key alone, or neither; else as safe as the control connection",
    )
    add(
        "--pool",
        metavar="COUNT",
        type=_reads(partial(parse_count, maximum=MAX_POOL)),
        default=8,
        help="of tcp, parked when it is quiet (%(default)s)",
    )
    add(
        "--max-pool",
        metavar="COUNT",
        type=_reads(partial(parse_count, maximum=MAX_POOL)),
        default=200,
        help="of tcp, parked under load (%(default)s)",
    )
    add(
        "--proxy-protocol",
        action="store_true",
        help="tell the local server each visitor's address in a PROXY protocol header, version 2",
    )


def _add_visitor_options(group: argparse._ArgumentGroup) -> None:
    for option, metavar, what in (
        ("allow-from", "NETWORKS", "the only places that visitors may come from"),
        ("deny-from", "NETWORKS", "places that visitors may not come from"),
        ("max-visitors", "COUNT", "how many are relayed at once"),
        ("max-per-source", "COUNT", "how many of them from one address"),
        ("visitor-rate", "N[/s|/m|/h]", "how many new ones from there"),
        ("bandwidth", "OCTETS[k|M|G]", "octets per second, shared by all"),
        ("quota", "OCTETS[k|M|G|T]", "octets in all, then the tunnel closes"),
    ):
        group.add_argument(f"--{option}", metavar=metavar, help=what)


def _add_health_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--health", choices=("tcp", "http"), help="does it take a connection (tcp), does it answer GET (http)?")
    add("--health-path", metavar="PATH", type=_path, default=PATH, help="what http asks for (%(default)s)")
    for option, default, what in (("interval", INTERVAL, "between two checks"), ("timeout", TIMEOUT, "for an answer")):
        name, help_text = f"--health-{option}", f"{what} (%(default)g)"
        add(name, metavar="SECONDS", type=positive_seconds, default=default, help=help_text)
    for option, count, what in (
        ("unhealthy", UNHEALTHY_AFTER, "failures in a row that make it unhealthy"),
        ("healthy", HEALTHY_AFTER, "successes in a row that make it healthy again"),
    ):
        add(
            f"--{option}-after",
            metavar="COUNT",
            type=_reads(partial(parse_count, maximum=MAX_CHECKS)),
            default=count,
            help=f"{what} (%(default)s)",
        )
    add(
        "--unhealthy",
        choices=[conduct.value for conduct in UnhealthyPolicy],
        default=UnhealthyPolicy.ANSWER.value,
        help="then visitors are told so where the check is http, and else closed (answer), are left to other agents of "
        "the tunnel or to wait (withdraw), or are served as ever (tell); now %(default)s",
    )


def _path(text: str) -> str:
    if not (text.startswith("/") and text.isascii() and text.isprintable() and " " not in text):
        raise argparse.ArgumentTypeError(f"not a path that a request line can carry: {text!r}")
    return text


def _reads(parse: Callable[[str], int]) -> Callable[[str], int]:
    """A parser of policy.options as the `type` of an argument: its `ValueError` is the message."""

    def read(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}: {text!r}") from None

    return read
