"""What systemctl status shows: how many there are, and what is the matter for as long as it is."""

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
from tunneld.config.schema import Settings, TlsFiles
from tunneld.daemon import Daemon, status
from tunneld.tls import contexts
from tunneld.tls.self_signed import LIFE, make_self_signed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")


async def test_the_status_counts_and_says_why_a_reload_failed_until_one_works(tmp_path: Path) -> None:
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


async def test_certificates_are_looked_at_twice_a_day(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    papers = make_self_signed("relay.example.org", datetime.now(UTC) - LIFE + timedelta(days=3, hours=1))
    (tmp_path / "relay.pem").write_bytes(papers.certificate)
    (tmp_path / "relay.key").write_bytes(papers.key)
    tls = TlsFiles(certificate=tmp_path / "relay.pem", key=tmp_path / "relay.key")
    shown = [(contexts.server_tls_context(tls), tls.certificate)]
    how = status.SystemdStatus(Daemon(Settings(), None, Settings).service, lambda: shown)
    with capture_logs() as logs:
        nursery.start_soon(how.tell)
        await trio.sleep(2.5 * status.CERTIFICATES)
        nursery.cancel_scope.cancel()
    assert [line["event"] for line in logs] == ["certificate expires soon"] * 3
    complaint = f"certificate {tmp_path}/relay.pem expires in 3 days"
    assert str(how) == f"0 tunnels, 0 visitors; reservations are not stored; {complaint}"
