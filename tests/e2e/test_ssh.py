"""OpenSSH through a tunnel: a command, scp, rsync."""

from __future__ import annotations

import getpass
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.support.exposed import exposed
from tests.support.programs import free_port, listening, run
from tunneld.net.endpoint import Endpoint

MIB = 1 << 20
Find = Callable[[str], str]

SSHD = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/me.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""

SSH = """
Host hidden
    HostName {address.host}
    Port {address.port}
    User {user}
    IdentityFile {folder}/me
    IdentitiesOnly yes
    IdentityAgent none
    BatchMode yes
    StrictHostKeyChecking yes
    UserKnownHostsFile {folder}/known
    GlobalKnownHostsFile /dev/null
"""


@asynccontextmanager
async def sshd(folder: Path, find: Find) -> AsyncIterator[str]:
    """Run `sshd` with keys in `folder`, and yield its port."""
    for name in ("host", "me"):
        await run([find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}"])
    port, configuration = await free_port(), folder / "sshd_config"
    configuration.write_text(SSHD.format(folder=folder, port=port))
    await trio.Path("/run/sshd").mkdir(exist_ok=True)  # where sshd insists on an empty folder; its package makes it
    async with listening([find("sshd"), "-D", "-e", "-f", str(configuration)], port):
        yield str(port)


def configure(folder: Path, address: Endpoint) -> str:
    """Write the visitor's configuration, which has the host key of the hidden server."""
    key = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[{address.host}]:{address.port} {key}")
    (folder / "ssh_config").write_text(SSH.format(folder=folder, address=address, user=getpass.getuser()))
    return f"{folder}/ssh_config"


async def test_a_command_its_input_and_its_exit_status(tmp_path: Path, program_path: Find, way: str) -> None:
    content = hashlib.sha256(b"input").digest() * (8 * MIB // 32)
    async with sshd(tmp_path, program_path) as port, exposed(way, tmp_path, port) as server:
        ssh = [program_path("ssh"), "-F", configure(tmp_path, server.address), "hidden"]
        assert await run([*ssh, "sha256sum"], stdin=content) == f"{hashlib.sha256(content).hexdigest()}  -\n"
        done = await trio.run_process([*ssh, "echo before; exit 3"], capture_stdout=True, check=False)
        assert (done.stdout, done.returncode) == (b"before\n", 3)


async def test_scp_in_both_directions(tmp_path: Path, program_path: Find, way: str) -> None:
    content = hashlib.sha256(b"file").digest() * (8 * MIB // 32)
    (tmp_path / "file").write_bytes(content)
    async with sshd(tmp_path, program_path) as port, exposed(way, tmp_path, port) as server:
        scp = [program_path("scp"), "-q", "-F", configure(tmp_path, server.address)]
        await run([*scp, f"{tmp_path}/file", f"hidden:{tmp_path}/there"])
        await run([*scp, f"hidden:{tmp_path}/there", f"{tmp_path}/back"])
        assert (tmp_path / "back").read_bytes() == content


async def test_rsync_copies_a_tree_and_then_only_changes(tmp_path: Path, program_path: Find, way: str) -> None:
    tree = tmp_path / "tree"
    for number in range(50):
        path = tree / f"{number % 7}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(b"%d" % number).digest() * (1 + 97 * number))
    async with sshd(tmp_path, program_path) as port, exposed(way, tmp_path, port) as server:
        shell = f"{program_path('ssh')} -F {configure(tmp_path, server.address)}"
        rsync = [program_path("rsync"), "-a", "--out-format=%n", "-e", shell]
        await run([*rsync, f"{tree}/", f"hidden:{tmp_path}/copy/"])
        (tree / "3" / "3").write_bytes(b"changed")
        said = await run([*rsync, f"{tree}/", f"hidden:{tmp_path}/copy/"])
        assert said.split() == ["3/3"]
        assert contents(tmp_path / "copy") == contents(tree)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
