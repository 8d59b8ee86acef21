"""Lines of `authorized_keys` (sshd(8)). Separate from the credentials, because asyncssh takes half a second to import.

An unknown option could be one that restricts the key, so it is an error and is not ignored.
"""

from __future__ import annotations

import re
from pathlib import Path

import asyncssh

from tunneld.config.wording import literal
from tunneld.errors import UsageError, reason_of

MAX_KEY_FILE = 64 * 1024
"""Bytes read of a public key file: an RSA key of 16384 bits has 3 KiB, and a comment may be long."""
SUPPORTED_OPTIONS = frozenset(
    {"from", "cert-authority", "principals", "restrict", "port-forwarding", "no-port-forwarding"}
)
"""Options that have an effect here."""
IGNORED_OPTIONS = frozenset(
    f"{no}{what}" for no in ("", "no-") for what in ("agent-forwarding", "pty", "user-rc", "x11-forwarding")
)
"""Options about features that the relay never offers."""
_KEY = re.compile(r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-")
_OPTION = re.compile(r'(?P<name>[A-Za-z0-9@.-]+)(?P<value>="(?:\\"|[^"])*")?(?:,(?=\S)|(?P<end>\s+))')


def check_line(line: str) -> None:
    """Raise `ValueError` unless `line` is one public key, with or without options in front."""
    if len(line.splitlines()) != 1 or not line.isprintable():
        raise ValueError("not a line of authorized_keys; write each key as a separate string")
    if line.startswith("-----"):
        raise ValueError("this is a private key; use the public key, from the file that ends in .pub")
    options, key = split(line)
    for option in options:
        name = option.partition("=")[0].lower()
        if name not in SUPPORTED_OPTIONS | IGNORED_OPTIONS:
            supported = ", ".join(sorted(SUPPORTED_OPTIONS))
            raise ValueError(f"option {name} of {literal(key[:40])} is not supported; supported options: {supported}")
    try:
        asyncssh.import_authorized_keys(line)
    except ValueError:
        raise _invalid_line(line) from None


def read_public_key(file: Path) -> str:
    """Read a file like `id_ed25519.pub`, given with `--ssh-key`, as a line of authorized_keys. Raises `UsageError`."""
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_KEY_FILE).decode(errors="replace").strip()
        check_line(text)
    except OSError as error:
        raise UsageError(f"--ssh-key {file}: {reason_of(error)}") from None
    except ValueError as error:
        raise UsageError(f"--ssh-key {file}: {error}") from None
    return text


def split(line: str) -> tuple[list[str], str]:
    """The options in front of the key, and the rest of the line. Raises `ValueError` if they are malformed."""
    options: list[str] = []
    at = len(line) - len(line.lstrip())
    while not _KEY.match(line, at):
        found = _OPTION.match(line, at)
        if found is None:
            raise _invalid_line(line)
        options.append(found["name"] + (found["value"] or ""))
        at = found.end()
        if found["end"] is not None:
            break
    return options, line[at:]


def may_forward(options: list[str]) -> bool:
    """Whether a key with these options may forward ports; the last option about it counts."""
    may = True
    for option in map(str.lower, options):
        if option in {"restrict", "no-port-forwarding"}:
            may = False
        elif option == "port-forwarding":
            may = True
    return may


def _invalid_line(line: str) -> ValueError:
    return ValueError(
        f"{literal(line[:60])} is not a line of authorized_keys; copy the line of a file like id_ed25519.pub, "
        'for example "ssh-ed25519 AAAA... name"'
    )
