"""What survives a restart, in the folder `acme/HASH` of the state folder, with a hash of the directory's URL:

    account.key      the key of the account there
    failures.json    names whose orders failed, and when they may be tried again

Certificates are in the folder `certificates` beside it, see tls/folder.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tunneld.tls.private_files import temporary_beside, write_private

ACCOUNT_KEY = "account.key"
FAILURES = "failures.json"
CERTIFICATES = "certificates"


@dataclass(frozen=True, slots=True)
class Failure:
    """Orders for a name that failed: how many in a row, when the next one may be placed, and the last reason."""

    count: int
    retry_at: float  # seconds since 1970
    reason: str


def certificate_folder(state: Path) -> Path:
    """Where the certificates are."""
    return state / CERTIFICATES


def account_folder(state: Path, directory: str) -> Path:
    """The folder of the account at a directory."""
    return state / "acme" / hashlib.sha256(directory.encode()).hexdigest()[:16]


def read_failures(folder: Path) -> dict[str, Failure]:
    """The failures by name; none where the file cannot be read, and then names are tried at once."""
    try:
        rows = json.loads((folder / FAILURES).read_bytes())
        return {
            str(name): Failure(int(row["count"]), float(row["retry_at"]), str(row["reason"]))
            for name, row in rows.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def write_failures(folder: Path, failures: Mapping[str, Failure]) -> None:
    """Write them. A folder that cannot be written is no error: names are then tried at once after a restart."""
    new = temporary_beside(folder / FAILURES)
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        write_private(new, json.dumps({name: asdict(each) for name, each in failures.items()}, indent=1).encode())
        new.replace(folder / FAILURES)
