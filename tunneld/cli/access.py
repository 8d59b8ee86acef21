"""The options with which every verb of `tunnel` reaches a relay, and what comes of them."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from tunneld.cli.common import Parser
from tunneld.cli.tables import Form

if TYPE_CHECKING:
    import ssl

    from tunneld.agent.expose import RelayAccess

DEFAULT_RELAY = "127.0.0.1:7010"
"""Where a daemon with the built-in configuration listens."""
DEFAULT_TIMEOUT = 10.0
"""Seconds for each step; a slow satellite link needs two."""


def add_relay_options(parser: Parser) -> None:
    """`--relay` and its kin. The environment is read when the parser is made, so `--help` shows what holds."""
    group = parser.add_argument_group("the relay")
    group.add_argument(
        "--relay",
        metavar="HOST:PORT",
        default=os.environ.get("TUNNEL_RELAY") or DEFAULT_RELAY,
        help="its control port, as tls://HOST:PORT if that speaks TLS ($TUNNEL_RELAY; now %(default)s)",
    )
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
        "--timeout",
        metavar="SECONDS",
        type=positive_seconds,
        default=DEFAULT_TIMEOUT,
        help="wait so long for each answer (%(default)g)",
    )


def access(options: argparse.Namespace) -> RelayAccess:
    """How to reach the relay. Raises `ConfigError` for unusable certificate files."""
    from tunneld.agent.expose import RelayAccess  # noqa: PLC0415 - --help does without Trio

    return RelayAccess(options.relay, _tls(options), options.timeout)


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


def _tls(options: argparse.Namespace) -> ssl.SSLContext | None:
    """A context where the relay is `tls://`, or where certificates are given and it is not `tcp://`."""
    scheme = options.relay.partition("://")[0].lower() if "://" in options.relay else ""
    if scheme != "tls" and (scheme or not (options.ca or options.cert)):
        return None
    from tunneld.net import client_tls_context  # noqa: PLC0415 - as above

    return client_tls_context(options.ca, options.cert, options.key)
