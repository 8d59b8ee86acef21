"""The relay options that every command of `tunnel` has, and the `RelayAccess` built from them.

A secret comes from a file, the environment or a prompt, and never from the command line, which every user of the
machine can read in the list of processes.
"""

from __future__ import annotations

import argparse
import codecs
import getpass
import os
import signal
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tunneld.cli.common import Parser, complain, on_interrupt
from tunneld.cli.tables import Form
from tunneld.errors import UsageError, reason_of
from tunneld.net.endpoint import CONTROL_PORT
from tunneld.policy.units import parse_positive_seconds

if TYPE_CHECKING:
    import ssl

    from tunneld.agent.access import RelayAccess

MAX_SECRET_FILE = 1024
"""Largest size in bytes of a file with a secret; a larger file is the wrong one."""


def as_option(word: str) -> str:
    """Spell a key as a command line option: `max_pool` as `--max-pool`."""
    return f"--{word.replace('_', '-')}"


def credential(
    options: argparse.Namespace,
    ask: Callable[[str], str] | None = None,
    spell: Callable[[str], str] = as_option,
) -> tuple[str, str] | None:
    """Return the name and the secret of the credential; None if no name is given. Raises `UsageError`.

    The secret is taken from the first of `--secret-file`, $TUNNEL_SECRET and $TUNNEL_SECRET_FILE that is set, else from
    `ask`, which is called with the name and is `from_terminal` by default. If two are set, the user is told which one
    is used.
    """
    name = options.credential or os.environ.get("TUNNEL_CREDENTIAL")
    if not name:
        if options.secret_file:
            raise UsageError(f"{spell('secret_file')} {options.secret_file} is of no use without --credential NAME")
        return None
    given = sources(options, spell)
    if len(given) > 1:
        complain(f"tunnel: the secret of {name!r} is taken from {given[0]}, not from {' or '.join(given[1:])}")
    if path := file_of(options):
        return name, from_file(path, warn=True)
    return name, os.environ.get("TUNNEL_SECRET") or (ask or from_terminal)(name)


def sources(options: argparse.Namespace, spell: Callable[[str], str] = as_option) -> list[str]:
    """Where a secret is given, as the user wrote it; the first one is used."""
    path, variable = options.secret_file, os.environ.get("TUNNEL_SECRET_FILE")
    return [
        *([f"{spell('secret_file')} {path}"] if path else []),
        *(["$TUNNEL_SECRET"] if os.environ.get("TUNNEL_SECRET") else []),
        *([f"$TUNNEL_SECRET_FILE ({variable})"] if variable else []),
    ]


def file_of(options: argparse.Namespace) -> str | None:
    """Return the path of the file with the secret, if the secret comes from a file."""
    if options.secret_file or os.environ.get("TUNNEL_SECRET"):
        return options.secret_file or None
    return os.environ.get("TUNNEL_SECRET_FILE")


def from_file(path: str, *, warn: bool = False) -> str:
    """Read a secret, the only line of its file, without the line end and a byte order mark.

    Raises `UsageError`, also if every user can read the file and this one could change that. Where it cannot, as for
    the secrets of containers, the file is used, and `warn` says whether to print a warning.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a pipe of the shell (<(pass show relay)) is as good
            about, is_fixed = os.fstat(file.fileno()), _is_fixed(file.fileno())
            content = file.read(MAX_SECRET_FILE + 1)
    except OSError as error:
        raise UsageError(f"could not read the secret file {path}: {reason_of(error)}") from None
    if stat.S_ISREG(about.st_mode) and about.st_mode & stat.S_IROTH:
        if not is_fixed:
            raise UsageError(f"every user of this machine can read the secret file {path}; run chmod o-rwx on it")
        if warn:
            complain(f"tunnel: warning: every user of this machine can read the secret file {path}")
    text = content.removeprefix(codecs.BOM_UTF8)
    secret = text.removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")
    if not secret or len(content) > MAX_SECRET_FILE or "\n" in secret:
        raise UsageError(f"the secret file {path} must have exactly one line, of at most {MAX_SECRET_FILE} bytes")
    return secret


def _is_fixed(descriptor: int) -> bool:
    """Whether this user cannot change the mode of an open file: it belongs to another one, or cannot be written to."""
    read_only = bool(os.fstatvfs(descriptor).f_flag & os.ST_RDONLY)
    return read_only or os.geteuid() not in {0, os.fstat(descriptor).st_uid}


def from_terminal(name: str) -> str:
    """Prompt for a secret without echo. Raises `UsageError` if standard input is not a terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            f"no secret for the credential {name!r}: use --secret-file FILE or $TUNNEL_SECRET, or run in a terminal"
        )
    try:
        with on_interrupt(signal.default_int_handler):  # an exception, so that getpass turns the echo on again
            return getpass.getpass(f"secret of {name}: ")
    except EOFError:
        raise UsageError(f"no secret for the credential {name!r} was typed") from None


T = TypeVar("T")

DEFAULT_RELAY = f"127.0.0.1:{CONTROL_PORT}"
"""The control port of a daemon with the built-in configuration."""
DEFAULT_TIMEOUT = 10.0
"""Seconds for each step of a request; a slow satellite link needs two."""


def add_relay_options(parser: Parser) -> None:
    """Add `--relay` and the options for TLS and authentication.

    The environment is read when the parser is made, so that `--help` shows the values in force.
    """
    group = parser.add_argument_group("relay options")
    group.add_argument(
        "--relay",
        metavar="HOST[:PORT]",
        default=os.environ.get("TUNNEL_RELAY") or DEFAULT_RELAY,
        help="control port of the relay; tls://HOST[:PORT] if it uses TLS ($TUNNEL_RELAY; currently %(default)s)",
    )
    _add_verification(group)
    add_credential_options(group)
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=partial(parsed, parse_positive_seconds),
        default=DEFAULT_TIMEOUT,
        help="time limit for each answer of the relay (default: %(default)g)",
    )


def access(
    options: argparse.Namespace,
    spell: Callable[[str], str] = as_option,
    ask: Callable[[str], str] = from_terminal,
) -> RelayAccess:
    """Build the relay's address, TLS context and credential. Raises `UsageError`, and `ConfigError` for certificate
    files that cannot be used.

    `spell` turns a key of `options` into the form that the user wrote, for error messages. `ask` is called for the
    secret of a credential if no file and no variable has it.
    """
    from tunneld.agent.access import RelayAccess  # noqa: PLC0415 - --help does without Trio

    path = file_of(options)
    reread = partial(from_file, path) if path and Path(path).is_file() else None  # a pipe can be read only once
    known = credential(options, ask, spell)
    source = next(iter(sources(options, spell)), "the prompt") if known is not None else ""
    return RelayAccess(options.relay, _tls(options, spell), options.timeout, known, reread, source)


def form(options: argparse.Namespace) -> Form:
    """Return the output format: JSON if asked for, tables on a terminal, otherwise tab-separated fields."""
    if options.json:
        return Form.JSON
    return Form.PEOPLE if sys.stdout.isatty() else Form.FIELDS


def parsed(parse: Callable[[str], T], text: str) -> T:
    """Read the value of an argument, whose `type` is a `partial` of this; what `parse` raises becomes the message."""
    try:
        return parse(text)
    except (UsageError, ValueError) as error:
        reason = str(error)
        raise argparse.ArgumentTypeError(reason if repr(text) in reason else f"{reason}: {text!r}") from None


def _add_verification(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("ca", "trust the certificate authorities in this file instead of those of the system"),
        ("cert", "client certificate to present to the relay"),
        ("key", "private key of the certificate, if it is not in the same file"),
    ):
        variable = f"TUNNEL_{name.upper()}"
        group.add_argument(
            f"--{name}", metavar="FILE", default=os.environ.get(variable) or None, help=f"{what} (${variable})"
        )
    group.add_argument(
        "--pin",
        metavar="sha256:HEX",
        type=_pin,
        default=os.environ.get("TUNNEL_PIN") or None,
        help="trust only the relay certificate with this fingerprint, as printed by `tunneld init` ($TUNNEL_PIN)",
    )
    group.add_argument("--insecure", action="store_true", help="use TLS without checking the relay's certificate")


def add_credential_options(group: argparse._ArgumentGroup) -> None:
    """Add `--credential` and `--secret-file`; the secret itself is no option."""
    group.add_argument(
        "--credential", metavar="NAME", help="credential to authenticate with ($TUNNEL_CREDENTIAL; default: none)"
    )
    group.add_argument(
        "--secret-file",
        metavar="FILE",
        help="file with the secret ($TUNNEL_SECRET_FILE); otherwise $TUNNEL_SECRET or a prompt",
    )


def _pin(text: str) -> str:
    from tunneld.tls.pins import parse_pins  # noqa: PLC0415 - --help does without ssl

    try:
        return parse_pins(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tls(options: argparse.Namespace, spell: Callable[[str], str]) -> ssl.SSLContext | None:
    """Return a context if the relay is `tls://`, or has no scheme and TLS options are given.

    `--cert` may be set for all relays and is ignored for `tcp://`. `--pin` and `--insecure` concern one relay, so they
    are an error there.
    """
    scheme = options.relay.partition("://")[0].lower() if "://" in options.relay else ""
    verified_by = [name for name in ("pin", "insecure") if getattr(options, name)]
    if scheme == "tcp" and verified_by:
        raise UsageError(f"relay {options.relay} does not use TLS; {spell(verified_by[0])} requires tls://")
    if scheme != "tls" and (scheme or not (options.ca or options.cert or verified_by)):
        return None
    from tunneld.tls.contexts import client_tls_context, unverified_tls_context  # noqa: PLC0415 - as above

    if not options.insecure:
        return client_tls_context(options.ca, options.cert, options.key, pin=options.pin)
    if options.ca or options.pin:
        other = spell("ca" if options.ca else "pin")
        raise UsageError(f"{spell('insecure')} checks no certificate, so it cannot be combined with {other}")
    complain(f"tunnel: warning: {spell('insecure')}: the certificate of relay {options.relay} is not checked")
    return unverified_tls_context(options.cert, options.key)
