"""`ssh -R` and `ssh -J` with `sshd` and keys that exist for the length of the run."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.processes import LOOPBACK, Address, BenchError, Child, Crew, free_port, need

CIPHER = "aes128-gcm@openssh.com"
"""OpenSSH's fastest cipher on processors with AES instructions; the default, ChaCha20, is half as fast."""

SEPARATION = Path("/run/sshd")
"""The privilege separation folder of an sshd run by root, usually made when the system's sshd is started."""

SSHD = """
ListenAddress {listen[0]}:{listen[1]}
HostKey {folder}/host
AuthorizedKeysFile {folder}/visitor.pub
PidFile none
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding {forwarding}
Ciphers {cipher}
"""


def forward(crew: Crew, server: Address) -> tuple[Child, Address]:
    """Start sshd and ssh. Returns the sshd and the address for visitors. Raises `BenchError`."""
    for name in ("host", "visitor"):
        make_key(crew.folder / name)
    listen = (LOOPBACK, free_port())
    config = crew.file(
        "sshd_config", SSHD.format(listen=listen, folder=crew.folder, cipher=CIPHER, forwarding="remote")
    )
    if os.getuid() == 0:
        crew.share(separation_folder())
    daemon = crew.start("sshd", [need("sshd"), "-D", "-e", "-f", config])
    daemon.listening(listen[1])
    client = crew.start("ssh", command(crew.folder / "visitor", listen, server))
    return daemon, (LOOPBACK, client.line(allocated))


SSH = """
Host *
    BatchMode yes
    Ciphers {cipher}
    ExitOnForwardFailure yes
    GlobalKnownHostsFile {null}
    IdentitiesOnly yes
    IdentityAgent none
    IdentityFile {folder}/visitor
    StrictHostKeyChecking no
    User {user}
    UserKnownHostsFile {null}
Host jump
    HostName {jump[0]}
    Port {jump[1]}
Host hidden
    HostName {hidden[0]}
    Port {hidden[1]}
    ProxyJump jump
"""


def jump(crew: Crew, server: Address) -> tuple[Child, Address]:
    """Start two sshd, and a client that reaches the second through the first, and the server from there. Returns the
    first sshd and the address for visitors. Raises `BenchError`.
    """
    for name in ("host", "visitor"):
        make_key(crew.folder / name)
    if os.getuid() == 0:
        crew.share(separation_folder())
    daemons, addresses = [], []
    for name in ("jump", "hidden"):
        listen = (LOOPBACK, free_port())
        text = SSHD.format(listen=listen, folder=crew.folder, cipher=CIPHER, forwarding="local")
        daemon = crew.start(f"sshd ({name})", [need("sshd"), "-D", "-e", "-f", crew.file(f"sshd_{name}", text)])
        daemon.listening(listen[1])
        daemons.append(daemon)
        addresses.append(listen)
    config = crew.file(
        "ssh_config",
        SSH.format(
            cipher=CIPHER,
            null=os.devnull,
            folder=crew.folder,
            user=getpass.getuser(),
            jump=addresses[0],
            hidden=addresses[1],
        ),
    )
    port = free_port()
    local = f"{LOOPBACK}:{port}:{server[0]}:{server[1]}"
    client = crew.start("ssh", [need("ssh"), "-F", config, "-N", "-T", "-L", local, "hidden"])
    client.listening(port)
    return daemons[0], (LOOPBACK, port)


def command(key: Path | None, sshd: Address, server: Address) -> list[str | Path]:
    """Return the client's command line, which ignores the user's configuration, agent and known hosts."""
    options = {
        "BatchMode": "yes",
        "Ciphers": CIPHER,
        "ExitOnForwardFailure": "yes",
        "GlobalKnownHostsFile": os.devnull,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": os.devnull,
    }
    remote = f"{LOOPBACK}:0:{server[0]}:{server[1]}"
    settings = [f"-o{name}={value}" for name, value in options.items()]
    where = ["-p", str(sshd[1]), "-l", getpass.getuser(), sshd[0]]
    identity: list[str | Path] = [] if key is None else ["-i", key]
    return [need("ssh"), "-F", "none", "-N", "-T", *settings, *identity, "-R", remote, *where]


def make_key(path: Path) -> None:
    """Make a key pair without a passphrase. Raises `BenchError`."""
    made = subprocess.run(
        [need("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise BenchError(f"ssh-keygen exited with status {made.returncode}: {made.stderr.strip()}")


@contextmanager
def separation_folder() -> Iterator[None]:
    """Make the privilege separation folder for the duration of the block, unless it exists."""
    made = not SEPARATION.exists()
    if made:
        SEPARATION.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            with suppress(OSError):
                SEPARATION.rmdir()


def allocated(line: str) -> int | None:
    """Parse the line in which the client prints its port; None for any other line."""
    found = re.search(r"Allocated port (\d+) for remote forward", line)
    return int(found[1]) if found else None
