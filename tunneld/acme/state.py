"""What an order yields, and what survives a restart. The latter is in the folder `acme/HASH` of the state folder, with
a hash of the directory's URL:

    account.key      the key of the account there
    failures.json    names whose orders failed, and when they may be tried again

Certificates are in the folder `certificates` beside it, see tls/folder.py.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Container, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tunneld.acme.schedule import retry_delay
from tunneld.tls.private_files import temporary_beside, write_private

ACCOUNT_KEY = "account.key"
FAILURES = "failures.json"
CERTIFICATES = "certificates"
MAX_FAILURES = 10_000
"Names whose failures are kept: as many as a relay has names."


@dataclass(frozen=True, slots=True)
class Issued:
    """A new certificate. `chain` and `key` are PEM; the key is unencrypted."""

    chain: bytes
    key: bytes


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


class FailureTable:
    """The failures by name, oldest first. At most `MAX_FAILURES` are kept."""

    def __init__(self) -> None:
        self._by_name: dict[str, Failure] = {}
        self._folder: Path | None = None
        self._lock = threading.Lock()  # of the file

    def get(self, name: str) -> Failure | None:
        """The failure of a name, if its last order failed."""
        return self._by_name.get(name)

    def items(self) -> Iterable[tuple[str, Failure]]:
        """All of them."""
        return self._by_name.items()

    def names(self) -> Collection[str]:
        """The names whose last order failed."""
        return self._by_name.keys()

    def record(self, name: str, reason: str, now: float, first: float, longest: float) -> Failure:
        """Count one more failure. It is tried again after `first` seconds, later after up to `longest`."""
        former = self._by_name.pop(name, None)
        count = former.count + 1 if former is not None else 1
        failure = Failure(count, now + retry_delay(count, first, longest), reason)
        self._by_name[name] = failure
        if len(self._by_name) > MAX_FAILURES:
            del self._by_name[next(iter(self._by_name))]
        return failure

    def forget(self, name: str) -> bool:
        """An order for the name succeeded. Returns whether there is something to save."""
        return self._by_name.pop(name, None) is not None

    def forget_old(self, before: float, names: Container[str]) -> None:
        """Forget the failures that were to be tried again at a time `before`, but for `names`, which are wanted."""
        for name, each in list(self._by_name.items()):
            if each.retry_at < before and name not in names:
                del self._by_name[name]

    def load(self, folder: Path) -> None:
        """Use the failures stored in a folder; none where they cannot be read, and then names are tried at once."""
        self._folder = folder
        try:
            rows = json.loads((folder / FAILURES).read_bytes())
            self._by_name = {
                str(name): Failure(int(row["count"]), float(row["retry_at"]), str(row["reason"]))
                for name, row in rows.items()
            }
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            self._by_name = {}

    def save(self) -> None:
        """Store the failures; may be called in a worker thread. A folder that cannot be written is no error: names are
        then tried at once after a restart.
        """
        folder, rows = self._folder, {name: asdict(each) for name, each in list(self._by_name.items())}
        if folder is None:
            return
        new = temporary_beside(folder / FAILURES)
        with self._lock, suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            write_private(new, json.dumps(rows, indent=1).encode())
            new.replace(folder / FAILURES)
