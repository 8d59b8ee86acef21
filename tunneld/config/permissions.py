"""Who can change the files of a configuration: the file itself, certificates, keys and secrets.

An account that can change one of them controls the relay, so a file that every user can write is refused. Write access
of the file's group may be intended, and is a warning.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from tunneld.config.schema import Settings


def config_files(settings: Settings, config: Path | None) -> Iterator[tuple[str, Path]]:
    """The files that a start or a reload reads, each with the key that names it."""
    if config is not None:
        yield "--config", config
    for table, tls in settings.certificates.items():
        for name in ("certificate", "key", "client_ca"):
            if (path := getattr(tls, name)) is not None:
                yield f"{table}.{name}", path
    for table, named in settings.named_certificates.items():
        yield f"{table}.certificate", named.certificate
        yield f"{table}.key", named.key
    yield from _acme_files(settings)
    for credential in settings.credential:
        if credential.secret_file is not None:
            yield f"credential.{credential.name}.secret_file", credential.secret_file


def _acme_files(settings: Settings) -> Iterator[tuple[str, Path]]:
    if settings.acme.ca_file is not None:
        yield "acme.ca_file", settings.acme.ca_file
    if settings.acme.rfc2136 is not None:
        yield "acme.rfc2136.key_secret_file", settings.acme.rfc2136.key_secret_file


def writable_by_all(settings: Settings, config: Path | None) -> list[str]:
    """One sentence for each file that every user of this machine can change."""
    return [
        f"{key}: every user of this machine can change {path}; run chmod o-w on it"
        for key, path in _writable(settings, config, stat.S_IWOTH)
    ]


def writable_by_group(settings: Settings, config: Path | None) -> list[str]:
    """One sentence for each file that members of its group can change."""
    return [
        f"{key}: the members of its group can change {path}; run chmod g-w on it unless that is intended"
        for key, path in _writable(settings, config, stat.S_IWGRP)
    ]


def _writable(settings: Settings, config: Path | None, mode: int) -> Iterator[tuple[str, Path]]:
    files = list(config_files(settings, config))
    if settings.ssh.host_key is not None:
        files.append(("ssh.host_key", settings.ssh.host_key))
    for key, path in files:
        try:
            about = path.stat()
        except OSError:  # it is reported where it is read
            continue
        if stat.S_ISREG(about.st_mode) and about.st_mode & mode:
            yield key, path
