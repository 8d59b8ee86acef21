"""The options with which every verb of `tunnel` reaches a relay, and what comes of them.

Where a person's secret comes from: a file, the environment, a prompt. Never the command line, which all users of a
machine can read in its list of processes.
"""

from __future__ import annotations

import argparse
import getpass
import os
import signal
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunneld.cli.common import Parser, complain, on_interrupt
from tunneld.cli.tables import Form
from tunneld.errors import UsageError, reason_of
from tunneld.net.endpoint import CONTROL_PORT

if TYPE_CHECKING:
    import ssl

    from tunneld.agent.access import RelayAccess

LARGEST = 1024
"""Octets of a file with a secret; a larger one is the wrong file."""


def credential(options: argparse.Namespace, ask: Callable[[str], str] | None = None) -> tuple[str, str] | None:
    """The name and the secret that the options and the environment lead to. Raises `UsageError`.

    What is typed goes before what is set, so: `--secret-file`, $TUNNEL_SECRET, $TUNNEL_SECRET_FILE, else what `ask`
    answers for the name: by default `from_terminal`.
    """
    name = options.credential or os.environ.get("TUNNEL_CREDENTIAL")
    if not name:
        if options.secret_file:
            raise UsageError(f"--secret-file {options.secret_file} without --credential: whose secret is it?")
        return None
    if path := file_of(options):
        return name, from_file(path)
    return name, os.environ.get("TUNNEL_SECRET") or (ask or from_terminal)(name)


def file_of(options: argparse.Namespace) -> str | None:
    """The file that the secret comes from, if it comes from one."""
    if options.secret_file or os.environ.get("TUNNEL_SECRET"):
        return options.secret_file or None
    return os.environ.get("TUNNEL_SECRET_FILE")


def from_file(path: str) -> str:
    """The one line in a file that strangers cannot read. Raises `UsageError`."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a pipe of the shell (<(pass show relay)) is as good
            about = os.fstat(file.fileno())
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"could not read the secret file {path}: {reason_of(error)}") from None
    if stat.S_ISREG(about.st_mode) and about.st_mode & stat.S_IROTH:
        raise UsageError(f"every user of this machine can read the secret file {path}: chmod o-rwx it")
    secret = content.removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")
    if not secret or len(content) > LARGEST or "\n" in secret:
        raise UsageError(f"the secret file {path} is not one line of at most {LARGEST} octets")
    return secret


def from_terminal(name: str) -> str:
    """What a person types unseen. Raises `UsageError` where nobody can be asked."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            f"no secret for the credential {name!r}: give --secret-file, $TUNNEL_SECRET or a terminal to ask on"
        )
    try:
        with on_interrupt(signal.default_int_handler):  # the terminal shows again what is typed
            return getpass.getpass(f"secret of {name}: ")
    except EOFError:
        raise UsageError(f"no secret for the credential {name!r} was typed") from None


DEFAULT_RELAY = f"127.0.0.1:{CONTROL_PORT}"
"""Where a daemon with the built-in configuration listens."""
DEFAULT_TIMEOUT = 10.0
"""Seconds for each step; a slow satellite link needs two."""


def add_relay_options(parser: Parser) -> None:
    """`--relay` and its kin. The environment is read when the parser is made, so `--help` shows what holds."""
    group = parser.add_argument_group("the relay")
    group.add_argument(
        "--relay",
        metavar="HOST[:PORT]",
        default=os.environ.get("TUNNEL_RELAY") or DEFAULT_RELAY,
        help="its control port, as tls://HOST[:PORT] if that speaks TLS ($TUNNEL_RELAY; now %(default)s)",
    )
    _add_verification(group)
    add_credential_options(group)
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive_seconds,
        default=DEFAULT_TIMEOUT,
        help="wait so long for each answer (%(default)g)",
    )


def as_option(word: str) -> str:
    """How a person spells `max_pool` on a command line."""
    return f"--{word.replace('_', '-')}"


def access(
    options: argparse.Namespace,
    spell: Callable[[str], str] = as_option,
    ask: Callable[[str], str] = from_terminal,
) -> RelayAccess:
    """How to reach the relay, and as whom. Raises `ConfigError` for unusable certificate files, `UsageError`.

    `spell` is how the words of `options` were written, `ask` gives the secret of a name where nothing else does.
    """
    from tunneld.agent.access import RelayAccess  # noqa: PLC0415 - --help does without Trio

    path = file_of(options)
    reread = partial(from_file, path) if path and Path(path).is_file() else None  # and not a pipe of the shell
    return RelayAccess(options.relay, _tls(options, spell), options.timeout, credential(options, ask), reread)


def form(options: argparse.Namespace) -> Form:
    """What standard output wants."""
    if options.json:
        return Form.JSON
    return Form.PEOPLE if sys.stdout.isatty() else Form.FIELDS


def positive_seconds(text: str) -> float:
    """Read a time. Raises `argparse.ArgumentTypeError`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 365 * 24 * 3600:
        raise argparse.ArgumentTypeError(f"not a number of seconds between 0 and a year: {text!r}")
    return value


def some_seconds(text: str) -> float:
    """Read a time that may be none. Raises `argparse.ArgumentTypeError`."""
    return 0.0 if text in {"0", "0.0"} else positive_seconds(text)


def _add_verification(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("ca", "trust relays whose certificate comes from this authority, instead of the system's"),
        ("cert", "show this certificate to the relay"),
        ("key", "the key of the certificate, where it is not in the same file"),
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
        help="trust the relay whose certificate has this fingerprint, and no other ($TUNNEL_PIN)",
    )
    group.add_argument("--insecure", action="store_true", help="TLS with whoever answers, checking nothing")


def add_credential_options(group: argparse._ArgumentGroup) -> None:
    """`--credential` and where its secret is; the secret itself is no option."""
    group.add_argument("--credential", metavar="NAME", help="who we are, where the relay asks ($TUNNEL_CREDENTIAL)")
    group.add_argument(
        "--secret-file",
        metavar="FILE",
        help="the file with the secret of the credential ($TUNNEL_SECRET_FILE); else $TUNNEL_SECRET, or a prompt",
    )


def _pin(text: str) -> str:
    from tunneld.tls.pins import parse_pins  # noqa: PLC0415 - --help does without ssl

    try:
        return parse_pins(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tls(options: argparse.Namespace, spell: Callable[[str], str]) -> ssl.SSLContext | None:
    """A context where the relay is `tls://`, or where it is to be verified by TLS and is not `tcp://`.

    A certificate of ours may be set for all relays and is left out where there is no TLS; a pin is for one relay, and
    must not be passed over.
    """
    scheme = options.relay.partition("://")[0].lower() if "://" in options.relay else ""
    verified_by = [name for name in ("pin", "insecure") if getattr(options, name)]
    if scheme == "tcp" and verified_by:
        raise UsageError(f"relay {options.relay} is asked for no certificate, so {spell(verified_by[0])} needs tls://")
    if scheme != "tls" and (scheme or not (options.ca or options.cert or verified_by)):
        return None
    from tunneld.tls.contexts import client_tls_context, unverified_tls_context  # noqa: PLC0415 - as above

    if not options.insecure:
        return client_tls_context(options.ca, options.cert, options.key, pin=options.pin)
    if options.ca or options.pin:
        other = spell("ca" if options.ca else "pin")
        raise UsageError(f"{spell('insecure')} checks no certificate, so it cannot be with {other}")
    complain(f"tunnel: warning: {spell('insecure')}: whoever answers as relay {options.relay} is believed to be it")
    return unverified_tls_context(options.cert, options.key)
