"""The servers of the daemon, without its process."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.peers import PATIENCE, read_exactly
from tunneld.config import load
from tunneld.config.schema import Settings
from tunneld.daemon import Daemon
from tunneld.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SSH needs the pump")


def settings(**tables: Any) -> Settings:
    anywhere = {service: {"port": 0} for service in ("control", "http", "webmux")}
    return Settings.model_validate({"tunnels": {"ports": "0"}, **anywhere, **tables})


async def test_a_reload_warns_of_files_that_their_group_can_change_and_refuses_others(tmp_path: Path) -> None:
    config = tmp_path / "tunnel.toml"
    config.write_text("control.port = 0\n")
    config.chmod(0o664)
    daemon = Daemon(load(config), config, lambda: load(config))
    with patch("tunneld.daemon.log.configure"), capture_logs() as logs:
        daemon.reload()
    (problem,) = (line["problem"] for line in logs if line["log_level"] == "warning")
    assert problem.startswith(f"--config: the members of its group can change {config}; run chmod g-w on it")
    config.chmod(0o666)
    with pytest.raises(ConfigError, match="every user of this machine can change"):
        daemon.reload()


async def test_a_reload_before_the_servers_run_enables_ssh(tmp_path: Path, nursery: trio.Nursery) -> None:
    before = settings(daemon={"state": tmp_path})
    after = settings(daemon={"state": tmp_path}, ssh={"enabled": True, "port": 0})
    daemon = Daemon(before, None, lambda: after)
    servers = daemon.servers
    servers.listen(before)
    servers.apply(servers.prepare(before, after))
    daemon.settings = after
    frozen = gc.get_freeze_count()
    with trio.fail_after(PATIENCE):
        for part in (daemon.engine, daemon.handshakes, daemon.service, servers):
            await nursery.start(part.run)
        assert gc.get_freeze_count() > frozen  # else each full collection scans the modules that ssh needs
        gc.unfreeze()
        async with await trio.open_tcp_stream("127.0.0.1", servers.listeners.by_service["ssh"].port) as stream:
            assert await read_exactly(stream, 4) == b"SSH-"
    nursery.cancel_scope.cancel()
