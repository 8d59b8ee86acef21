"""Dropping root privileges, with the real users root and nobody."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.peers import connect, read_exactly
from tests.support.pki import Pki
from tests.support.programs import daemon
from tests.support.system import is_root_with
from tunneld.config import Settings
from tunneld.config.schema import DaemonSettings, TunnelSettings
from tunneld.daemon import privileges
from tunneld.errors import ConfigError
from tunneld.net.endpoint import Endpoint

NOBODY = pwd.getpwnam("nobody")

DAC_OVERRIDE, SETGID, SETUID, NET_BIND_SERVICE = 1, 6, 7, 10

as_root = pytest.mark.skipif(
    not is_root_with(DAC_OVERRIDE, SETGID, SETUID, NET_BIND_SERVICE),
    reason="only root on Linux, with its capabilities, has privileges to drop",
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that the user nobody can enter, unlike pytest's."""
    made = Path("/tmp") / f"tunneld-{os.getpid()}-{tmp_path.name}"
    made.mkdir(mode=0o755)
    yield made
    shutil.rmtree(made)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def low_port() -> int:
    """A free port below 1024."""
    for port in range(1023, 900, -1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    pytest.skip("no port below 1024 is free")


@as_root
async def test_a_low_port_is_bound_and_then_all_privileges_are_dropped(folder: Path) -> None:
    port = low_port()
    async with daemon(folder, daemon_lines='user = "nobody"', control=port) as relay:
        assert relay.control == f"tcp://127.0.0.1:{port}"
        status = status_of(relay.process.pid)
        assert set(status["Uid"].split()) == {str(NOBODY.pw_uid)}
        assert set(status["Gid"].split()) == {str(NOBODY.pw_gid)}
        assert set(status["Groups"].split()) <= {str(NOBODY.pw_gid)}
        assert [int(status[key], 16) for key in ("CapPrm", "CapEff", "CapInh", "CapAmb")] == [0] * 4
        assert status["NoNewPrivs"] == "1"
        assert (folder / "state").stat().st_uid == NOBODY.pw_uid
        assert "ERR" not in await relay.ask("openTunnel tcp")


@as_root
async def test_a_reload_to_a_port_below_1024_fails_and_changes_nothing(folder: Path) -> None:
    async with daemon(folder, daemon_lines='user = "nobody"') as relay:
        config = folder / "tunnel.toml"
        config.write_text(config.read_text().replace("port = 0", f"port = {low_port()}", 1))
        assert "permission denied" in await relay.ask("reload")
        assert "OK 0 tunnels" in await relay.ask("list")


@as_root
async def test_tunnels_on_low_ports_keep_one_capability(folder: Path) -> None:
    port = low_port()
    async with daemon(folder, daemon_lines='user = "nobody"', ports=f"{port - 1}-{port}") as relay:
        status = status_of(relay.process.pid)
        bind = 1 << privileges.NET_BIND_SERVICE
        assert [int(status[key], 16) for key in ("CapPrm", "CapEff", "CapInh", "CapAmb")] == [bind] * 4
        said = await relay.ask("openTunnel tcp persist=yes")
        server = Endpoint.parse(next(word for word in said.split() if word.startswith("tcp://")))
        assert server.port in {port - 1, port}
        hidden = await connect(server)
        visitor = await connect(Endpoint("tcp", "127.0.0.1", 2 * port - 1 - server.port))
        await visitor.send_all(b"x")
        assert await read_exactly(hidden, 1) == b"x"


@as_root
async def test_files_that_a_reload_could_not_read_are_logged_at_the_start(folder: Path) -> None:
    pki = Pki.issue(folder)
    for name in ("relay.pem", "ca.pem"):
        (folder / name).chmod(0o644)
    key = folder / "relay.key"
    key.chmod(0o600)
    async with daemon(folder, pki=pki, daemon_lines='user = "nobody"') as relay:
        told = [line for line in relay.log if line["event"] == "cannot read a file that a reload needs"]
        assert [(line["key"], line["path"], line["reason"]) for line in told] == [
            ("control.tls.key", str(key), "permission denied")
        ]


@as_root
async def test_running_as_root_logs_a_warning(folder: Path) -> None:
    async with daemon(folder) as relay:
        assert any("running as root is unnecessary" in line["event"] for line in relay.log)


def user_nobody_can_run_python() -> bool:
    """Whether the user nobody can run this Python; not if its files are in root's home."""
    program = [
        "import os",
        f"os.setuid({NOBODY.pw_uid})",
        f"os.execv({sys.executable!r}, ['python', '-c', 'import trio'])",
    ]
    tried = subprocess.run([sys.executable, "-c", "; ".join(program)], check=False, capture_output=True, timeout=60)
    return os.geteuid() == 0 and not tried.returncode


@as_root
@pytest.mark.skipif(not user_nobody_can_run_python(), reason="the user nobody cannot run this Python")
async def test_it_restarts_as_the_user_nobody(folder: Path) -> None:
    async with daemon(folder, daemon_lines='user = "nobody"', control=low_port()) as relay:
        relay.process.send_signal(signal.SIGUSR2)
        await relay.wait_logged("ready", 2)
        assert set(status_of(relay.process.pid)["Uid"].split()) == {str(NOBODY.pw_uid)}
        assert "OK 0 tunnels" in await relay.ask("list")


def with_user(user: str, group: str = "") -> Settings:
    return Settings(daemon=DaemonSettings(user=user, group=group))


def test_an_unknown_user_or_group_is_reported() -> None:
    with pytest.raises(ConfigError, match="no user 'tunnel-nobody'; create it with useradd --system"):
        privileges.identity(with_user("tunnel-nobody"))
    with pytest.raises(ConfigError, match="no group 'no-such-group'"):
        privileges.identity(with_user(str(os.geteuid()), "no-such-group"))


def test_no_user_is_set_by_default_and_a_number_can_be_used() -> None:
    assert privileges.identity(Settings()) is None
    me = pwd.getpwuid(os.geteuid())
    assert privileges.identity(with_user(str(me.pw_uid))) == privileges.identity(with_user(me.pw_name))


def test_only_root_can_change_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="user 12345 cannot change to user 'nobody': start the daemon as root"):
        privileges.identity(with_user("nobody"))


@pytest.mark.parametrize(("ports", "low"), [("0", False), ("1023-2000", True), ("1024-2000", False), ("443", True)])
def test_ports_below_1024_need_the_capability(ports: str, low: bool) -> None:
    assert privileges.wants_low_ports(Settings(tunnels=TunnelSettings(ports=ports))) == low
