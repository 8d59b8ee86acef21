"""The status line in `systemctl status`: counts, and each problem for as long as it lasts."""

from __future__ import annotations

import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.support.manager import manager
from tunneld.config.certificates import TlsFiles
from tunneld.config.schema import Settings
from tunneld.daemon import Daemon, status
from tunneld.tls.self_signed import LIFE, make_self_signed
from tunneld.tls.store import CertificateStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd exists on Linux only")


async def test_the_status_shows_why_a_reload_failed_until_one_succeeds(tmp_path: Path) -> None:
    async with manager(tmp_path) as systemd, systemd.service() as relay:
        await systemd.wait_status("0 tunnels, 0 visitors")
        config = tmp_path / "tunnel.toml"
        right = config.read_text()
        config.write_text(right + "\n[contrl]\n[htp]\n")
        relay.process.send_signal(signal.SIGHUP)
        await systemd.wait_status(
            r"0 tunnels, 0 visitors; reload failed, nothing changed: \S+tunnel.toml: .*contrl.* \(and 1 more\)"
        )
        await relay.ask("openTunnel tcp persist=yes")
        relay.process.send_signal(signal.SIGUSR2)
        await systemd.wait_status("1 tunnel, 0 visitors; restart failed, nothing changed: .*")
        config.write_text(right)
        await relay.ask("reload")
        await systemd.wait_status("1 tunnel, 0 visitors")


async def test_certificates_are_checked_twice_a_day(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    certificate = make_self_signed("relay.example.org", datetime.now(UTC) - LIFE + timedelta(days=3, hours=1))
    (tmp_path / "relay.pem").write_bytes(certificate.certificate)
    (tmp_path / "relay.key").write_bytes(certificate.key)
    store = CertificateStore()
    store.apply(store.load({"control.tls": TlsFiles(certificate=tmp_path / "relay.pem", key=tmp_path / "relay.key")}))
    systemd_status = status.SystemdStatus(Daemon(Settings(), None, Settings).service, store)
    with capture_logs() as logs:
        nursery.start_soon(systemd_status.run)
        await trio.sleep(2.5 * status.CERTIFICATE_CHECK_INTERVAL)
        nursery.cancel_scope.cancel()
    assert [line["event"] for line in logs] == ["certificate expires soon"] * 3
    complaint = f"certificate {tmp_path}/relay.pem expires in 3 days"
    assert str(systemd_status) == f"0 tunnels, 0 visitors; reservations are not stored; {complaint}"


async def test_names_without_a_certificate_are_mentioned() -> None:
    missing: list[str] = []
    shown = status.SystemdStatus(Daemon(Settings(), None, Settings).service, CertificateStore(), lambda: missing)
    before = str(shown)
    missing += ["no certificate for a.example.org: no such zone"]
    assert str(shown) == f"{before}; no certificate for a.example.org: no such zone"
    missing += ["no certificate for b.example.org: no such zone"] * 2
    assert str(shown).endswith("a.example.org: no such zone; 2 more without a certificate")
