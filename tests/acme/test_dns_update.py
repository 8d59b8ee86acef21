"""dns-01 by dynamic updates, with a name server that is played, and that verifies the signature."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.name_server import SECRET, NameServer, serving_names
from tunneld.acme.dns_update import DnsUpdate
from tunneld.errors import UsageError


@pytest.fixture
def server() -> Iterator[NameServer]:
    with serving_names() as server:
        yield server


def update_of(server: NameServer, folder: Path, secret: str = SECRET) -> tuple[DnsUpdate, list[float]]:
    (folder / "key").write_text(secret + "\n")
    slept: list[float] = []
    update = DnsUpdate(
        ("127.0.0.1", server.port), "tunneld.", folder / "key", "hmac-sha256", 5.0, 7.0, sleep=slept.append
    )
    return update, slept


CHALLENGE: Any = None


def test_a_record_is_set_and_removed(server: NameServer, tmp_path: Path) -> None:
    update, slept = update_of(server, tmp_path)
    update.present("t.example.org", CHALLENGE, "value")
    assert server.records == {("_acme-challenge.t.example.org.", "value")}
    assert slept == [7.0]  # until the other servers have it
    update.present("t.example.org", CHALLENGE, "second")  # of the wildcard and of the name itself
    update.remove("t.example.org", CHALLENGE, "value")
    assert server.records == {("_acme-challenge.t.example.org.", "second")}


def test_a_refusal_says_why(server: NameServer, tmp_path: Path) -> None:
    update, _ = update_of(server, tmp_path)
    server.refuses = True
    with pytest.raises(UsageError, match=r"could not update _acme-challenge\.t\.example\.org\. at 127.*REFUSED"):
        update.present("t.example.org", CHALLENGE, "value")
    update.remove("t.example.org", CHALLENGE, "value")
    with pytest.raises(UsageError, match="it has no zone with this name"):
        update.present("example.com", CHALLENGE, "value")


def test_a_wrong_key(server: NameServer, tmp_path: Path) -> None:
    wrong, _ = update_of(server, tmp_path, "d3Jvbmctd3Jvbmctd3Jvbmctd3Jvbmctd3Jvbmctd3I=")
    with pytest.raises(UsageError, match=r"could not update .*\(acme\.rfc2136\): "):
        wrong.present("t.example.org", CHALLENGE, "value")
    broken, _ = update_of(server, tmp_path, "not base64!")
    with pytest.raises(UsageError, match="could not update"):
        broken.present("t.example.org", CHALLENGE, "value")
    assert server.records == set()
