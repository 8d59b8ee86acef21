"""`tunneld`: the command line of the daemon, tunneld(8)."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunneld.cli.access import add_credential_options
from tunneld.cli.common import Parser, complain, run, say
from tunneld.errors import AwaitedConfigError, ConfigError

if TYPE_CHECKING:
    from tunneld.config import Settings

# Copies of values in the schema, so that --help need not import pydantic; a test compares them.
FORMATS = ("auto", "human", "json")
LEVELS = ("debug", "info", "warning", "error")
PORTS = "20000-29999"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tunneld` with these arguments, or with those of the process. Returns the exit status."""
    return run("tunneld", lambda: _command(parser().parse_args(argv)))


def _command(options: argparse.Namespace) -> int:
    status: int = options.command(options)
    return status


def parser() -> Parser:
    """Make the parser. Shell completion and the test of the manual page use it, too."""
    made = Parser(
        prog="tunneld",
        description="Run a relay, which makes servers behind NAT or a firewall reachable.",
        epilog="Signals: TERM and INT let open connections finish, a second one stops at once; HUP reloads the "
        "configuration; USR2 restarts and keeps connections. See tunneld(8) and tunnel.toml(5).",
        allow_abbrev=False,
    )
    made.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration file (default: the first that exists of $TUNNELD_CONFIG, ~/.config/tunneld/tunnel.toml and "
        "/etc/tunneld/tunnel.toml, else built-in defaults)",
    )
    instead = made.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="report errors in the configuration and exit")
    instead.add_argument("--print-config", action="store_true", help="print the configuration in force and exit")
    made.add_argument("--log-format", choices=FORMATS, help="override log.format: text for people, or JSON")
    made.add_argument("--log-level", choices=LEVELS, help="override log.level: the lowest level to log")
    made.add_common_options()
    commands = made.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, summary, add in (("init", INIT, _add_init), ("certificate", CERTIFICATE, _add_certificate)):
        description = f"{summary[0].upper()}{summary[1:]}."
        add(commands.add_parser(name, help=summary, description=description, allow_abbrev=False))
    made.set_defaults(command=_tunneld)
    return made


INIT = "write the configuration, certificate and credential of a public relay, and print the command for the agent"

DOMAIN = "domain for host names of tunnels: `tunnel expose 8000 --host blog` is then blog.NAME, on ports 80 and 443"

AGREE = "with --domain: get certificates from Let's Encrypt, whose terms of service you accept"

SSH_KEY = "public key (.pub) that may open tunnels over SSH; may be repeated"


def _add_init(parser: Parser) -> None:
    host_help = (
        "name or address by which clients reach this machine "
        "(default: that of --domain, else its address on the default route)"
    )
    parser.add_argument("--agree", action="store_true", help=AGREE)
    parser.add_argument("--domain", metavar="NAME", help=DOMAIN)
    parser.add_argument("--host", metavar="NAME", help=host_help)
    parser.add_argument("--ports", metavar="RANGE", default=PORTS, help="ports for tunnels (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, or folder for tunnel.toml (default: the file that tunneld would read)",
    )
    for service, port in (("control", 7010), ("http", 7011), ("webmux", 7012), ("ssh", 7022)):
        help_text = f"port of the relay's {service} service (default: %(default)s)"
        parser.add_argument(f"--{service}-port", metavar="PORT", type=int, default=port, help=help_text)
    parser.add_argument("--ssh-key", action="append", default=[], type=Path, metavar="FILE", help=SSH_KEY)
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.set_defaults(command=_init)


CERTIFICATE = "list, try or renew the certificates for host names"


def _add_certificate(parser: Parser) -> None:
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, what in (
        ("list", "list the certificates for host names: names, when they expire and are renewed, the last failure"),
        ("try", "order a certificate for a host name and throw it away, to find out what fails"),
        ("renew", "order a new certificate for a host name now"),
    ):
        action = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False)
        if name == "list":
            action.add_argument("--json", action="store_true", help="print JSON, one object per line")
        else:
            action.add_argument("name", metavar="NAME", help="the host name, or *. and a domain")
        add_credential_options(action.add_argument_group("credential options, for asking the relay if it runs"))
        action.set_defaults(command=_certificate, action=name)


def _certificate(options: argparse.Namespace) -> int:
    from tunneld.cli import certificate  # noqa: PLC0415 - needs libraries that are slow to import

    return certificate.run(options)


def _init(options: argparse.Namespace) -> int:
    from tunneld.cli import init  # noqa: PLC0415 - needs a library for certificates that is slow to import

    return init.run(options)


def _tunneld(options: argparse.Namespace) -> int:
    from tunneld import config  # noqa: PLC0415 - 250 ms that --help and --version do not need

    path = options.config or config.find_config()

    def load() -> Settings:
        return _overridden(config.load(path) if path is not None else config.Settings(), options)

    if options.check:
        return _check(load(), path)
    if options.print_config:
        say(config.dump(load()), end="")
        return 0
    has_stored = _has_stored_connections()
    try:
        return _serve(load(), path, load)
    except ConfigError as error:
        if has_stored:
            raise AwaitedConfigError(error.problems) from None
        raise


def _check(settings: Settings, path: Path | None) -> int:
    """Report what is dubious in a configuration that can be used."""
    from tunneld.config.permissions import writable_by_group  # noqa: PLC0415 - as above
    from tunneld.config.ports import services_among_tunnels  # noqa: PLC0415
    from tunneld.tls.store import CertificateStore  # noqa: PLC0415

    store = CertificateStore()
    store.apply(store.load(settings.certificates, settings.named_certificates))
    expiring = [problem for each in store.certificates() if (problem := each.problem(time.time()))]
    for warning in (*services_among_tunnels(settings), *writable_by_group(settings, path), *expiring):
        complain(f"tunneld: warning: {warning}")
    say(f"{path or 'built-in defaults'}: ok")
    return os.EX_OK


def _has_stored_connections() -> bool:
    """Whether systemd keeps connections of the previous process for this one."""
    if sys.platform != "linux":
        return False
    from tunneld.daemon.handover import Inherited  # noqa: PLC0415 - as above

    return bool(Inherited.parse(os.environ, os.getpid()).stored)


def _overridden(settings: Settings, options: argparse.Namespace) -> Settings:
    given = {"format": options.log_format, "level": options.log_level}
    log = settings.log.model_copy(update={key: value for key, value in given.items() if value is not None})
    return settings.model_copy(update={"log": log})


def _serve(settings: Settings, path: Path | None, load: Callable[[], Settings]) -> int:
    import trio  # noqa: PLC0415 - as above

    from tunneld import daemon  # noqa: PLC0415
    from tunneld.daemon import log  # noqa: PLC0415
    from tunneld.daemon.collector import Collector  # noqa: PLC0415

    log.configure(settings.log)
    Collector().install()
    return trio.run(daemon.run, settings, path, load, _restart_command(sys.orig_argv))


def _restart_command(words: Sequence[str]) -> list[str]:
    """Return the command that starts this program again, given the arguments of the interpreter.

    A script that was started by its own name is started that way again. So it keeps its name in ps(1), and if an
    upgrade replaced it or the link to it, its first line names the right Python. If the path of Python does not fit in
    that line (too long, or with a space), pip writes a script for /bin/sh that runs it.
    """
    with suppress(IndexError, OSError, ValueError), Path(words[1]).open("rb") as script:
        first, second = script.readline(1024), script.readline(1024)
        if first.split()[:1] == [b"#!" + os.fsencode(words[0])]:
            return list(words[1:])
        if first == b"#!/bin/sh\n" and shlex.split(os.fsdecode(second))[:2] == ["exec", words[0]]:
            return list(words[1:])
    return [sys.executable, *words[1:]]
