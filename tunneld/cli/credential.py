"""`tunnel credential`: manage the credentials of the relay on this machine, by editing its tunnel.toml.

The new text is checked as the daemon checks it, and then replaces the old file atomically, so that a daemon that
reloads reads one or the other. Then the daemon is reloaded, if it runs and permits that.
"""

from __future__ import annotations

import argparse
import codecs
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunneld.agent.access import RelayAccess
from tunneld.cli import toml_edit
from tunneld.cli.access import credential, form
from tunneld.cli.common import complain, say
from tunneld.cli.tables import Form, TableColumn, json_lines, table
from tunneld.config import Credential, Settings, find_config, load, make_verifier
from tunneld.config.file import parse
from tunneld.config.problems import sentences
from tunneld.errors import ConfigError, RelayUnreachableError, TunneldError, UsageError, reason_of
from tunneld.net.endpoint import is_wildcard, join_host_port
from tunneld.policy.access import GRANT_LIMITS
from tunneld.tls.contexts import client_tls_context
from tunneld.tls.pins import first_fingerprint
from tunneld.tls.private_files import temporary_beside, write_private

SECRET_BYTES = 24
"""Random bytes in a secret, which has 32 characters."""
COLUMNS = tuple(TableColumn(key) for key in ("name", "role", "proof", "limits"))


async def add(options: argparse.Namespace) -> int:
    """Add a credential and print its new secret."""
    secret = secrets.token_urlsafe(SECRET_BYTES)
    new = {"name": options.name, "role": options.role, "verifier": make_verifier(secret), **_limits(options)}
    if options.ssh_key:
        new["authorized_keys"] = _keys(options)
    status = await _edit(options, lambda text: toml_edit.added(text, new))
    complain(f"tunnel: on the other machine, run:\n\n    {_command_line(load(_path(options)), options, secret)}\n")
    say(secret)
    return status


async def change(options: argparse.Namespace) -> int:
    """Change the role, the limits and the SSH keys of a credential. Its secret and the rest are kept."""
    new = {**_limits(options), **dict.fromkeys(options.unset)}
    if options.role:
        new["role"] = options.role
    if not new and not options.ssh_key:
        raise UsageError("nothing to change; give a limit such as --max-tunnels 5, --role, --ssh-key or --unset KEY")

    def edited(text: str) -> str:
        if options.ssh_key:
            before = next((one for one in toml_edit.credentials(text) if one.get("name") == options.name), {})
            new["authorized_keys"] = [*before.get("authorized_keys", []), *_keys(options)]
        return toml_edit.changed(text, options.name, new)

    return await _edit(options, edited)


def _limits(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key in GRANT_LIMITS if (value := getattr(options, key)) is not None}


def _keys(options: argparse.Namespace) -> list[str]:
    """The public keys to add, as lines of authorized_keys. Raises `UsageError`."""
    from tunneld.config.ssh_keys import read_public_key  # noqa: PLC0415  # asyncssh takes half a second to import

    return [read_public_key(file) for file in options.ssh_key]


def _command_line(settings: Settings, options: argparse.Namespace, secret: str) -> str:
    """The command for the machine that will use a new credential. It has the secret only where a person sees both: a
    file or a program that gets standard output has the secret from there.
    """
    control = settings.control
    host = settings.tunnels.advertised_host or (control.host if not is_wildcard(control.host) else "RELAY")
    relay = join_host_port(host, control.port)
    pin = first_fingerprint(control.tls.certificate) if control.tls else ""
    words = [
        f"TUNNEL_SECRET={secret}" if sys.stdout.isatty() else "TUNNEL_SECRET_FILE=FILE",
        f"tunnel expose 8000{_host(options)}" if options.role == "user" else "tunnel list",
        f"--relay {'tls://' if pin else ''}{relay} --credential {shlex.quote(options.name)}",
        *([f"--pin {pin}"] if pin else []),
    ]
    return " ".join(words)


def _host(options: argparse.Namespace) -> str:
    """The option for a host name, if the new credential has names of its own."""
    if not options.names:
        return ""
    return f" --host {next((name for name in options.names if '*' not in name), 'any')}"


async def rotate(options: argparse.Namespace) -> int:
    """Replace the secret of a credential and print the new one. The rest of the credential is kept."""
    secret = secrets.token_urlsafe(SECRET_BYTES)
    status = await _edit(options, lambda text: toml_edit.rotated(text, options.name, make_verifier(secret)))
    say(secret)
    return status


async def remove(options: argparse.Namespace) -> int:
    """Remove a credential."""
    return await _edit(options, lambda text: toml_edit.removed(text, options.name))


async def list_credentials(options: argparse.Namespace) -> int:
    """Print the name, role, means of authentication and limits of each credential; no secrets and no verifiers."""
    shape, found = form(options), load(_path(options)).credential
    if shape is Form.JSON:
        say(json_lines(_facts(one) for one in found), end="")
    elif found or shape is Form.FIELDS:
        say(table([_row(_facts(one)) for one in found], COLUMNS, shape), end="")
    else:
        say("no credentials: every client that can connect has all permissions")
    return os.EX_OK


def _facts(one: Credential) -> dict[str, Any]:
    return {**one.model_dump(mode="json", exclude_none=True, exclude={"verifier"}), "proof": one.proofs}


def _row(facts: Mapping[str, Any]) -> dict[str, str]:
    limits = " ".join(f"{key}={_text(facts[key])}" for key in GRANT_LIMITS if key in facts)
    return {"name": facts["name"], "role": facts["role"], "proof": _text(facts["proof"]), "limits": limits}


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


async def _edit(options: argparse.Namespace, change: Callable[[str], str]) -> int:
    """Change the file and reload the relay. Returns the exit status of the reload; the file is changed in any case."""
    path, requester = _path(options), credential(options)  # first, so that a missing secret changes nothing
    old = load(path)
    content = path.read_bytes()
    bom = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    try:
        new = bom + change(content.removeprefix(bom).decode()).encode()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    try:
        parse(new, path.absolute().parent)
    except ValidationError as error:
        raise ConfigError(
            [f"{path}: this change would be invalid: {problem}" for problem in sentences(error)]
        ) from None
    _replace(path, new)
    complain(f"tunnel: changed {path}")
    if old.credential and requester is None:
        complain("tunnel: the relay has not read it yet; send it SIGHUP, or run `tunnel reload` as an admin")
        return os.EX_OK
    return await _reload(old, requester)


async def _reload(settings: Settings, requester: tuple[str, str] | None) -> int:
    """Make the daemon that runs with these settings read its file again. It is no error if it does not run."""
    try:
        async with local_relay(settings, requester).connect() as client:
            await client.call("reload")
    except RelayUnreachableError as error:
        complain(f"tunnel: not reloaded: {error}; the relay will read the new file when it starts")
    except TunneldError as error:
        complain(f"tunnel: not reloaded, so the old configuration is still in force: {error}")
        return getattr(error, "status", error.exit_status)
    else:
        complain("tunnel: reloaded the relay")
    return os.EX_OK


def local_relay(settings: Settings, requester: tuple[str, str] | None) -> RelayAccess:
    """Make the access, from its own machine, to the relay with these settings. Its certificate file gives the pin.

    `requester` is the name and the secret of the credential to authenticate with. Raises `RelayUnreachableError` if the
    port is not known.
    """
    control = settings.control
    where = join_host_port("localhost" if is_wildcard(control.host) else control.host, control.port)
    if not control.port:
        raise RelayUnreachableError("control.port is 0 (any free port), so the port of the relay is not known")
    tls = client_tls_context(pin=first_fingerprint(control.tls.certificate)) if control.tls else None
    return RelayAccess(where, tls, credential=requester)


def _path(options: argparse.Namespace) -> Path:
    """Return the path of the file, with symbolic links resolved. Raises `UsageError` if there is none."""
    path: Path | None = options.config or find_config()
    if path is None:
        raise UsageError("no tunnel.toml found; use --config FILE, or create one with `tunneld init`")
    return path.resolve()


def _replace(path: Path, content: bytes) -> None:
    """Replace a file atomically, with the mode and the owner of the old file. Raises `ConfigError`."""
    new = temporary_beside(path)
    try:
        about = path.stat()
        try:
            write_private(new, content, like=about)
            new.replace(path)
        finally:
            with suppress(FileNotFoundError):
                new.unlink()
    except OSError as error:
        raise ConfigError([f"{path}: could not change the file: {reason_of(error)}"]) from None
