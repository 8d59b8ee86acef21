"""Certificate and key files: found, readable, and fit for each other before the daemon says it is ready.

Functions for the schema. They touch the disk only while a file is being loaded, which the validation context
tells: it has the folder that relative paths start from.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from pydantic import ValidationInfo

from tunneld.config.values import Loading, literal
from tunneld.errors import reason_of


def locate(value: Path | None, info: ValidationInfo) -> Path | None:
    """The path made absolute from the folder of the configuration file. Raises `ValueError` when it cannot be read.

    Symbolic links stay: they are how certificates are renewed.
    """
    if value is None or info.context is None:
        return value
    loading: Loading = info.context
    path = loading.folder / value
    try:
        str(path).encode()  # --print-config must be able to write it down
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"could not read {literal(path)}: {reason_of(error)}") from None
    except ValueError:
        raise ValueError(f"{literal(path)} is not a path: it holds a zero byte or is not UTF-8") from None
    return path


def place(value: Path | None, info: ValidationInfo) -> Path | None:
    """The path of a folder or a file made absolute in the same way. It need not be there. Raises `ValueError`."""
    if value is None:
        return value
    if value == Path():
        raise ValueError("an empty path is no place; leave the key out for the usual one")
    loading: Loading | None = info.context
    path = value if loading is None else loading.folder / value
    try:
        os.fsencode(path).decode()
    except ValueError:
        raise ValueError(f"{literal(path)} is not a path: it is not UTF-8") from None
    if "\0" in str(path):
        raise ValueError(f"{literal(path)} is not a path: it holds a zero byte")
    return path


def check_pair(certificate: Path, key: Path) -> None:
    """Raise `ValueError` unless OpenSSL takes the certificate chain and the private key, together."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"key {literal(key)} does not belong to certificate {literal(certificate)}") from None
        raise ValueError(f"certificate {literal(certificate)} and key {literal(key)} are not a PEM pair") from None
    except OSError as error:
        raise ValueError(f"could not read certificate {literal(certificate)}: {reason_of(error)}") from None


def check_authority(client_ca: Path) -> None:
    """Raise `ValueError` unless the file holds certificates that clients may be checked against."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(client_ca)
    except OSError:  # ssl.SSLError is one
        raise ValueError(f"client_ca {literal(client_ca)} holds no PEM certificate") from None


def _no_passphrase() -> str:
    """OpenSSL would ask on the terminal, which a daemon does not have."""
    raise ValueError("the key is locked with a passphrase, which a daemon cannot be asked for")
