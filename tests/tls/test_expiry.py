"""Checks of the relay's own certificates: about to expire, expired, and not valid yet."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from structlog.testing import capture_logs

from tests.support.pki import Pki
from tunneld.config.schema import TlsFiles
from tunneld.tls import contexts, expiry
from tunneld.tls.self_signed import LIFE, make_self_signed

NOW = datetime.now(UTC)


def shown(folder: Path, made: datetime) -> expiry.Shown:
    made_certificate = make_self_signed("relay.example.org", made)
    (folder / "relay.pem").write_bytes(made_certificate.certificate)
    (folder / "relay.key").write_bytes(made_certificate.key)
    tls = TlsFiles(certificate=folder / "relay.pem", key=folder / "relay.key")
    return contexts.server_tls_context(tls), tls.certificate


@pytest.mark.parametrize(
    ("made", "problems"),
    [
        (NOW, []),
        (NOW - LIFE + timedelta(days=15), []),
        (NOW - LIFE + timedelta(days=13, hours=1), ["expires in 13 days"]),
        (NOW - LIFE + timedelta(hours=1), ["expires in 0 days"]),
        (NOW - LIFE - timedelta(hours=1), ["has expired"]),
        (NOW + timedelta(days=2), ["is not valid yet: check this machine's clock"]),
    ],
)
def test_problems_are_reported_and_logged(tmp_path: Path, made: datetime, problems: list[str]) -> None:
    one = shown(tmp_path, made)
    with capture_logs() as logs:
        assert expiry.look([one]) == [f"certificate {one[1]} {words}" for words in problems]
    assert [line["log_level"] for line in logs] == ["warning" if "in " in words else "error" for words in problems]


def test_a_short_lived_certificate_is_reported_in_its_last_quarter(tmp_path: Path) -> None:
    begin, end = NOW - timedelta(days=1), NOW + timedelta(days=5)
    issued = trustme.CA().issue_cert("localhost", not_before=begin, not_after=end).private_key_and_cert_chain_pem
    both = tmp_path / "both.pem"
    issued.write_to_path(both)
    one = contexts.server_tls_context(TlsFiles(certificate=both, key=both)), both
    edge = end.timestamp() - expiry.WARN_FRACTION * (end - begin).total_seconds()
    assert not expiry.look([one], edge - 2)
    assert expiry.look([one], edge + 2) == [f"certificate {one[1]} expires in 1 day"]


def test_a_certificate_of_an_authority_is_checked_even_if_clients_must_show_one(tmp_path: Path) -> None:
    pki = Pki.issue(tmp_path)
    later = datetime(3000, 1, 1, tzinfo=UTC).timestamp()
    for context in (pki.server, pki.mutual):
        assert not expiry.look([(context, tmp_path / "relay.pem")])
        assert "expires in 0 days" in expiry.look([(context, tmp_path / "relay.pem")], later)[0]


def test_the_same_file_on_two_ports_is_one_problem(tmp_path: Path) -> None:
    one = shown(tmp_path, NOW - LIFE - timedelta(days=1))
    assert len(expiry.look([one, one])) == 1


def test_a_file_that_was_removed_is_not_a_problem_of_its_dates(tmp_path: Path) -> None:
    one = shown(tmp_path, NOW)
    one[1].unlink()
    assert not expiry.look([one])
