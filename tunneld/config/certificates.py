"""Validators for paths, certificates and keys: the files exist, are readable and belong together before the daemon is
ready.

The schema calls these functions. They read the disk only while a file is being loaded; then the validation context is a
`Loading`, with the folder that relative paths start from.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from pydantic import ValidationInfo

from tunneld.config.values import Loading, literal
from tunneld.errors import reason_of


def locate(value: Path | None, info: ValidationInfo) -> Path | None:
    """The path, made absolute from the folder of the configuration file. Raises `ValueError` if it cannot be read.

    Symbolic links are not resolved: they are how certificates are renewed.
    """
    if value is None or info.context is None:
        return value
    loading: Loading = info.context
    path = loading.folder / value
    try:
        str(path).encode()  # --print-config must be able to write it
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"could not read {literal(path)}: {reason_of(error)}") from None
    except ValueError:
        raise ValueError(f"{literal(path)} is not a path: it contains a zero byte or is not UTF-8") from None
    return path


def absolute_path(value: Path | None, info: ValidationInfo) -> Path | None:
    """The path of a file or folder, made absolute in the same way. It need not exist. Raises `ValueError`."""
    if value is None:
        return value
    if value == Path():
        raise ValueError("the path is empty; omit the key for the default")
    loading: Loading | None = info.context
    path = value if loading is None else loading.folder / value
    try:
        os.fsencode(path).decode()
    except ValueError:
        raise ValueError(f"{literal(path)} is not a path: it is not UTF-8") from None
    if "\0" in str(path):
        raise ValueError(f"{literal(path)} is not a path: it contains a zero byte")
    return path


def check_pair(certificate: Path, key: Path) -> None:
    """Raise `ValueError` unless OpenSSL accepts the certificate chain and the private key as a pair."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"key {literal(key)} does not belong to certificate {literal(certificate)}") from None
        raise ValueError(
            f"could not load certificate {literal(certificate)} with key {literal(key)}: not PEM files"
        ) from None
    except OSError as error:
        raise ValueError(f"could not read certificate {literal(certificate)}: {reason_of(error)}") from None


def check_authority(client_ca: Path) -> None:
    """Raise `ValueError` unless the file contains CA certificates in PEM format."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(client_ca)
    except OSError:  # includes ssl.SSLError
        raise ValueError(f"client_ca {literal(client_ca)} contains no PEM certificate") from None


def _no_passphrase() -> str:
    """Called by OpenSSL, which would otherwise ask on the terminal. A daemon has none."""
    raise ValueError("the key is protected by a passphrase, which a daemon cannot ask for; remove the passphrase")
