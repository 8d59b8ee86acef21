"""Our own certificates, looked at before their time is over, when it is, and before it has begun."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from structlog.testing import capture_logs

from tests.support.papers import Papers
from tunneld.config.schema import TlsFiles
from tunneld.tls import contexts, expiry
from tunneld.tls.self_signed import LIFE, make_self_signed

NOW = datetime.now(UTC)


def shown(folder: Path, made: datetime) -> expiry.Shown:
    papers = make_self_signed("relay.example.org", made)
    (folder / "relay.pem").write_bytes(papers.certificate)
    (folder / "relay.key").write_bytes(papers.key)
    tls = TlsFiles(certificate=folder / "relay.pem", key=folder / "relay.key")
    return contexts.server_tls_context(tls), tls.certificate


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (NOW, []),
        (NOW - LIFE + timedelta(days=15), []),
        (NOW - LIFE + timedelta(days=13, hours=1), ["expires in 13 days"]),
        (NOW - LIFE + timedelta(hours=1), ["expires in 0 days"]),
        (NOW - LIFE - timedelta(hours=1), ["has expired"]),
        (NOW + timedelta(days=2), ["is not valid yet: is the clock right?"]),
    ],
)
def test_it_is_told_before_others_refuse_it(tmp_path: Path, made: datetime, said: list[str]) -> None:
    one = shown(tmp_path, made)
    with capture_logs() as logs:
        assert expiry.look([one]) == [f"certificate {one[1]} {words}" for words in said]
    assert [line["log_level"] for line in logs] == ["warning" if "in " in words else "error" for words in said]


def test_one_that_lives_for_days_is_complained_of_in_its_last_quarter(tmp_path: Path) -> None:
    begin, end = NOW - timedelta(days=1), NOW + timedelta(days=5)
    paper = trustme.CA().issue_cert("localhost", not_before=begin, not_after=end).private_key_and_cert_chain_pem
    both = tmp_path / "both.pem"
    paper.write_to_path(both)
    one = contexts.server_tls_context(TlsFiles(certificate=both, key=both)), both
    edge = end.timestamp() - expiry.LAST_PART * (end - begin).total_seconds()
    assert not expiry.look([one], edge - 2)
    assert expiry.look([one], edge + 2) == [f"certificate {one[1]} expires in 1 day"]


def test_a_certificate_of_an_authority_is_looked_at_also_where_clients_must_show_one(tmp_path: Path) -> None:
    papers = Papers.issue(tmp_path)
    later = datetime(3000, 1, 1, tzinfo=UTC).timestamp()
    for context in (papers.server, papers.mutual):
        assert not expiry.look([(context, tmp_path / "relay.pem")])
        assert "expires in 0 days" in expiry.look([(context, tmp_path / "relay.pem")], later)[0]


def test_the_same_file_behind_two_ports_is_one_complaint(tmp_path: Path) -> None:
    one = shown(tmp_path, NOW - LIFE - timedelta(days=1))
    assert len(expiry.look([one, one])) == 1


def test_a_file_that_is_gone_by_now_is_no_trouble_of_its_dates(tmp_path: Path) -> None:
    one = shown(tmp_path, NOW)
    one[1].unlink()
    assert not expiry.look([one])
