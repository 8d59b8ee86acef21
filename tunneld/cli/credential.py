"""`tunnel credential`: who may use the relay on this machine, by editing its tunnel.toml and reloading it.

The new text is checked as the daemon checks it before it takes the place of the old one, in one step: a daemon that
reloads sees one or the other. Then the relay is told, where it runs and lets us; otherwise the file waits for it.
"""

from __future__ import annotations

import argparse
import codecs
import os
import secrets
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
from tunneld.tls.contexts import client_tls_context
from tunneld.tls.pins import first_fingerprint

SECRET_OCTETS = 24
"""Of randomness, 32 characters."""
LIMITS = (
    *("backends", "ports", "networks", "server_from"),
    *("max_tunnels", "max_visitors", "max_ttl", "bandwidth", "quota"),
)
"""Keys of `[[credential]]` that `add` takes as options."""


PROOFS = ("verifier", "secret_file", "secret_env", "certificate", "authorized_keys")
COLUMNS = tuple(TableColumn(key) for key in ("name", "role", "proof", "limits"))


async def add(options: argparse.Namespace) -> int:
    """A new credential, whose secret is printed once."""
    secret = secrets.token_urlsafe(SECRET_OCTETS)
    limits = {key: value for key in LIMITS if (value := getattr(options, key)) is not None}
    new = {"name": options.name, "role": options.role, "verifier": make_verifier(secret), **limits}
    if options.ssh_key:
        from tunneld.cli.public_key import read_public_key  # noqa: PLC0415  # asyncssh takes half a second to import

        new["authorized_keys"] = [read_public_key(file) for file in options.ssh_key]
    status = await _edit(options, lambda text: toml_edit.added(text, new))
    say(secret)
    return status


async def rotate(options: argparse.Namespace) -> int:
    """Another secret, printed once; the rest of the credential stays."""
    secret = secrets.token_urlsafe(SECRET_OCTETS)
    status = await _edit(options, lambda text: toml_edit.rotated(text, options.name, make_verifier(secret)))
    say(secret)
    return status


async def remove(options: argparse.Namespace) -> int:
    """Take a credential away."""
    return await _edit(options, lambda text: toml_edit.removed(text, options.name))


async def list_credentials(options: argparse.Namespace) -> int:
    """The names, what they may do, and how they prove themselves; no secret, and no verifier."""
    shape, found = form(options), load(_path(options)).credential
    if shape is Form.JSON:
        say(json_lines(_facts(one) for one in found), end="")
    elif found or shape is Form.FIELDS:
        say(table([_row(_facts(one)) for one in found], COLUMNS, shape), end="")
    else:
        say("no credential is in the file: everybody may do everything")
    return os.EX_OK


def _facts(one: Credential) -> dict[str, Any]:
    proof = [key for key in PROOFS if getattr(one, key)]
    return {**one.model_dump(mode="json", exclude_none=True, exclude={"verifier"}), "proof": proof}


def _row(facts: Mapping[str, Any]) -> dict[str, str]:
    limits = " ".join(f"{key}={_text(facts[key])}" for key in LIMITS if key in facts)
    return {"name": facts["name"], "role": facts["role"], "proof": _text(facts["proof"]), "limits": limits}


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


async def _edit(options: argparse.Namespace, change: Callable[[str], str]) -> int:
    """Change the file and tell the relay. Returns the exit status: the file is changed whatever it is."""
    path, ours = _path(options), credential(options)  # before anything happens: a missing secret is a mistake
    old = load(path)
    content = path.read_bytes()
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    try:
        new = mark + change(content.removeprefix(mark).decode()).encode()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    try:
        parse(new, path.absolute().parent)
    except ValidationError as error:
        raise ConfigError([f"{path}, changed, would be wrong: {problem}" for problem in sentences(error)]) from None
    _replace(path, new)
    complain(f"tunnel: changed {path}")
    if old.credential and ours is None:
        complain("tunnel: reload the relay for it to hold: SIGHUP, or `tunnel reload` as an admin")
        return os.EX_OK
    return await _reload(old, ours)


async def _reload(settings: Settings, ours: tuple[str, str] | None) -> int:
    """Have the daemon that runs with these settings read its file again; one that does not run needs no telling."""
    try:
        async with relay_of(settings, ours).connect() as client:
            await client.call("reload")
    except RelayUnreachableError as error:
        complain(f"tunnel: not reloaded: {error}; a relay that starts later reads the new file")
    except TunneldError as error:
        complain(f"tunnel: not reloaded, so the old file still holds: {error}")
        return getattr(error, "status", error.exit_status)
    else:
        complain("tunnel: the relay has read it")
    return os.EX_OK


def relay_of(settings: Settings, ours: tuple[str, str] | None) -> RelayAccess:
    """How to reach, from its own machine, the relay with these settings; its certificate file is its pin."""
    control = settings.control
    where = join_host_port("localhost" if is_wildcard(control.host) else control.host, control.port)
    if not control.port:
        raise RelayUnreachableError("control.port is 0, any free one, so the relay's is not known here")
    tls = client_tls_context(pin=first_fingerprint(control.tls.certificate)) if control.tls else None
    return RelayAccess(where, tls, credential=ours)


def _path(options: argparse.Namespace) -> Path:
    """The file itself, behind symbolic links. Raises `UsageError` where there is none."""
    path: Path | None = options.config or find_config()
    if path is None:
        raise UsageError("there is no tunnel.toml in the usual places: name it with --config, or run `tunneld init`")
    return path.resolve()


def _replace(path: Path, content: bytes) -> None:
    """In one step, with the mode and the owner of the old file. Raises `ConfigError`."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        about = path.stat()
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                os.fchown(file.fileno(), about.st_uid, about.st_gid)
                os.fchmod(file.fileno(), about.st_mode & 0o7777)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            with suppress(FileNotFoundError):
                new.unlink()
    except OSError as error:
        raise ConfigError([f"{path}: could not be changed: {reason_of(error)}"]) from None
