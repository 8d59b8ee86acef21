"""The faces of the process, without the process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.people import PATIENCE, read_exactly
from tunneld.config.schema import Settings
from tunneld.daemon import Daemon

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SSH lives in the pump")


def settings(**tables: Any) -> Settings:
    anywhere = {face: {"port": 0} for face in ("control", "http", "webmux")}
    return Settings.model_validate({"tunnels": {"ports": "0"}, **anywhere, **tables})


async def test_a_reload_that_comes_before_the_faces_are_open_enables_ssh_all_the_same(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    before = settings(daemon={"state": tmp_path})
    after = settings(daemon={"state": tmp_path}, ssh={"enabled": True, "port": 0})
    daemon = Daemon(before, None, lambda: after)
    front = daemon._front
    front.listen(before)
    front.change(front.prepare(before, after))
    daemon.settings = after
    with trio.fail_after(PATIENCE):
        for part in (daemon._engine, daemon._lobby, daemon.service, front):
            await nursery.start(part.run)
        async with await trio.open_tcp_stream("127.0.0.1", front._faces.doors["ssh"].port) as stream:
            assert await read_exactly(stream, 4) == b"SSH-"
    nursery.cancel_scope.cancel()
