"""Lines of `authorized_keys` (sshd(8)). Apart from the credentials, since asyncssh takes half a second to import.

An option that is not known here could be one that narrows what the key may do, so it is a mistake and not passed over.
"""

from __future__ import annotations

import re

import asyncssh

from tunneld.config.values import literal

OBEYED = frozenset({"from", "cert-authority", "principals", "restrict", "port-forwarding", "no-port-forwarding"})
"""Options that mean something here."""
HARMLESS = frozenset(
    f"{no}{what}" for no in ("", "no-") for what in ("agent-forwarding", "pty", "user-rc", "x11-forwarding")
)
"""Options about what nobody is given anyway."""
_KEY = re.compile(r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-")
_OPTION = re.compile(r'(?P<name>[A-Za-z0-9@.-]+)(?P<value>="(?:\\"|[^"])*")?(?:,(?=\S)|(?P<end>\s+))')


def check_line(line: str) -> None:
    """Raise `ValueError` unless it is one line with a public key, with or without options in front."""
    if len(line.splitlines()) != 1 or not line.isprintable():
        raise ValueError("not a line of authorized_keys: give each key as a string of its own")
    if line.startswith("-----"):
        raise ValueError("not a public key: the one to give is in the file whose name ends in .pub")
    options, key = split(line)
    for option in options:
        name = option.partition("=")[0].lower()
        if name not in OBEYED | HARMLESS:
            raise ValueError(f"the option {name} of {literal(key[:40])} is not known: {', '.join(sorted(OBEYED))} are")
    try:
        asyncssh.import_authorized_keys(line)
    except ValueError:
        raise _no_line(line) from None


def split(line: str) -> tuple[list[str], str]:
    """The options in front of the key, and the rest. Raises `ValueError` where they are none."""
    options: list[str] = []
    at = len(line) - len(line.lstrip())
    while not _KEY.match(line, at):
        found = _OPTION.match(line, at)
        if found is None:
            raise _no_line(line)
        options.append(found["name"] + (found["value"] or ""))
        at = found.end()
        if found["end"] is not None:
            break
    return options, line[at:]


def may_forward(options: list[str]) -> bool:
    """Whether a key with these options may have ports forwarded: the last word on it counts."""
    may = True
    for option in map(str.lower, options):
        if option in {"restrict", "no-port-forwarding"}:
            may = False
        elif option == "port-forwarding":
            may = True
    return may


def _no_line(line: str) -> ValueError:
    return ValueError(
        f"{literal(line[:60])} is not a line of authorized_keys: it takes what is in a file like id_ed25519.pub, "
        'for example "ssh-ed25519 AAAA... name"'
    )
