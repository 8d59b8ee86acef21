"""Where a person's secret comes from: a file, the environment, a prompt. Never the command line, which all users of a
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

from tunneld.cli.common import on_interrupt
from tunneld.errors import UsageError, reason_of

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
