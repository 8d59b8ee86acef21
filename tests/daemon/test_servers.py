"""The servers of the daemon, without its process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.peers import PATIENCE, read_exactly
from tunneld.config.schema import Settings
from tunneld.daemon import Daemon

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SSH needs the pump")


def settings(**tables: Any) -> Settings:
    anywhere = {service: {"port": 0} for service in ("control", "http", "webmux")}
    return Settings.model_validate({"tunnels": {"ports": "0"}, **anywhere, **tables})


async def test_a_reload_before_the_servers_run_enables_ssh(tmp_path: Path, nursery: trio.Nursery) -> None:
    before = settings(daemon={"state": tmp_path})
    after = settings(daemon={"state": tmp_path}, ssh={"enabled": True, "port": 0})
    daemon = Daemon(before, None, lambda: after)
    servers = daemon.servers
    servers.listen(before)
    servers.apply(servers.prepare(before, after))
    daemon.settings = after
    with trio.fail_after(PATIENCE):
        for part in (daemon.engine, daemon.handshakes, daemon.service, servers):
            await nursery.start(part.run)
        async with await trio.open_tcp_stream("127.0.0.1", servers.listeners.by_service["ssh"].port) as stream:
            assert await read_exactly(stream, 4) == b"SSH-"
    nursery.cancel_scope.cancel()
