"""`tunneld`: the daemon's command line, tunneld(8)."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunneld.cli.common import Parser, run, say
from tunneld.errors import AwaitedConfigError, ConfigError

if TYPE_CHECKING:
    from tunneld.config import Settings

# Said here again so that --help need not wait for pydantic; a test holds them to the schema.
FORMATS = ("auto", "human", "json")
LEVELS = ("debug", "info", "warning", "error")
PORTS = "20000-29999"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tunneld` with the arguments given, else those of the process. Returns the exit status."""
    return run("tunneld", lambda: _command(parser().parse_args(argv)))


def _command(options: argparse.Namespace) -> int:
    status: int = options.command(options)
    return status


def parser() -> Parser:
    """The parser; also for completion and for the test that reads the manual."""
    made = Parser(
        prog="tunneld",
        description="A tunnel service: servers behind NAT or a firewall dial out to it, their clients dial in, and it "
        "relays the bytes.",
        epilog="Signals: TERM and INT drain, a second one stops now, HUP reloads, USR2 starts again and keeps "
        "connections. See tunneld(8) and tunnel.toml(5).",
    )
    made.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration; else $TUNNELD_CONFIG, ~/.config/tunneld/tunnel.toml, /etc/tunneld/tunnel.toml, or "
        "built-in defaults",
    )
    instead = made.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="say what is wrong with the configuration, and exit")
    instead.add_argument("--print-config", action="store_true", help="print the effective configuration, and exit")
    made.add_argument("--log-format", choices=FORMATS, help="override log.format: one event a line, for people or JSON")
    made.add_argument("--log-level", choices=LEVELS, help="override log.level: the lowest level that is logged")
    made.add_common_options()
    commands = made.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    _add_init(commands.add_parser("init", help=INIT, description=INIT + "."))
    made.set_defaults(command=_tunneld)
    return made


INIT = "write a configuration, a certificate and a secret for a public relay, and print what to run elsewhere"


SSH_KEY = "a public key (.pub) that may open tunnels by ssh; may be given several times"


def _add_init(parser: Parser) -> None:
    parser.add_argument("--host", metavar="NAME", help="by what name or address clients reach this machine")
    parser.add_argument("--ports", metavar="RANGE", default=PORTS, help="the ports of all tunnels (%(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the file to write, or the folder to write tunnel.toml in; else where tunneld looks for one",
    )
    parser.add_argument("--ssh-key", action="append", default=[], type=Path, metavar="FILE", help=SSH_KEY)
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> int:
    from tunneld.cli import init  # noqa: PLC0415 - a library for certificates that nothing else needs

    return init.run(options)


def _tunneld(options: argparse.Namespace) -> int:
    from tunneld import config  # noqa: PLC0415 - 250 ms that --help and --version do not need

    path = options.config or config.find_config()

    def load() -> Settings:
        return _overridden(config.load(path) if path is not None else config.Settings(), options)

    if options.check:
        load()
        say(f"{path or 'built-in defaults'}: ok")
        return 0
    if options.print_config:
        say(config.dump(load()), end="")
        return 0
    is_awaited = _is_awaited()
    try:
        return _serve(load(), path, load)
    except ConfigError as error:
        if is_awaited:
            raise AwaitedConfigError(error.problems) from None
        raise


def _is_awaited() -> bool:
    """Whether systemd keeps connections for us, of a process before."""
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

    log.configure(settings.log)
    gc.freeze()  # what is there now stays: looking it through again and again stopped everybody for 16 ms
    return trio.run(daemon.run, settings, path, load, _how_started(sys.orig_argv))


def _how_started(words: Sequence[str]) -> list[str]:
    """The command that starts this program again. A script that was started by its own name is again: it keeps that
    name (ps(1) shows it), and when it, or the link to it, is another one by then, its first line says which Python goes
    with it. Where the path of Python does not fit in that line (long, or with a space), pip has /bin/sh run it.
    """
    with suppress(IndexError, OSError, ValueError), Path(words[1]).open("rb") as script:
        first, second = script.readline(1024), script.readline(1024)
        if first.split()[:1] == [b"#!" + os.fsencode(words[0])]:
            return list(words[1:])
        if first == b"#!/bin/sh\n" and shlex.split(os.fsdecode(second))[:2] == ["exec", words[0]]:
            return list(words[1:])
    return [sys.executable, *words[1:]]
