"""The two ways to the next process, and what that receives.

become     execve: the process stays, and with it all descriptors; the program is replaced
store      systemd keeps the descriptors (FDSTORE=1) while this process ends and another one starts
receive    called by the next process: returns what it got either way
"""

from __future__ import annotations

import os
import signal
from collections.abc import MutableMapping, Sequence

import structlog

from tunneld import systemd
from tunneld.daemon.handover.bundle import FdBundle, adopt, read_manifest, write_manifest
from tunneld.daemon.handover.inherited import MANIFEST_VARIABLE, STORED_NAME, Inherited
from tunneld.daemon.handover.snapshot import Snapshot, fds_of, unpack
from tunneld.errors import ShortageError, reason_of

log = structlog.get_logger("handover")

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", MANIFEST_VARIABLE)
"""Environment variables that `receive` reads and removes: they are not meant for child processes."""
FDS_PER_MESSAGE = 200
"""Descriptors in one message to systemd; the limit of the kernel is 253 (SCM_MAX_FD)."""
MAX_STORED_FDS = 16_384
"""Descriptors given to systemd if it does not say how many it takes. FileDescriptorStoreMax= of our unit is the same.
Their names, `kept:` for each, are returned in one environment variable, which is limited to 128 KiB.
"""


def become(command: Sequence[str], manifest: bytes, bundle: FdBundle, signals: Sequence[int]) -> None:
    """Replace this program by `command`, which receives the manifest and the bundle. Does not return.

    `signals` are blocked until the new program has its handlers, since without a handler a signal would end it.

    Raises `ShortageError` if the system refuses, and then everything in the bundle is closed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    try:
        fd = write_manifest(manifest, bundle.held)
        for one in bundle.sockets:
            one.set_inheritable(True)
        os.set_inheritable(fd, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        os.execve(command[0], list(command), {**environment, MANIFEST_VARIABLE: f"{os.getpid()}:{fd}"})
    except OSError as error:
        raise ShortageError(f"could not restart {command[0]}: {reason_of(error)}; connections are lost") from None
    finally:
        bundle.close()


def store_capacity() -> int:
    """How many sockets systemd keeps for us, in addition to the manifest; 0 if it cannot."""
    limit = os.environ.get("FDSTORE", "")  # set since systemd 254; otherwise assume the limit of our own unit
    capacity = int(limit) if limit.isascii() and limit.isdigit() else MAX_STORED_FDS
    return min(capacity, MAX_STORED_FDS) - 1 if systemd.is_available() else 0


def store(manifest: bytes, bundle: FdBundle) -> bool:
    """Give everything to systemd to keep for the next process. Returns whether systemd has it; closes the bundle."""
    try:
        fd = write_manifest(manifest, bundle.held)
    except OSError:
        bundle.close()
        return False
    try:
        fds = [fd, *(one.fileno() for one in bundle.sockets)]
        for start in range(0, len(fds), FDS_PER_MESSAGE):
            batch = fds[start : start + FDS_PER_MESSAGE]
            if not systemd.send(batch, FDSTORE="1", FDNAME=STORED_NAME, FDPOLL="0"):
                return False
        return systemd.barrier()
    finally:
        os.close(fd)
        bundle.close()


def receive(environ: MutableMapping[str, str]) -> tuple[Inherited, Snapshot]:
    """Return the inherited descriptors and the snapshot of the previous process. Removes `VARIABLES` from `environ`.

    Parts of the snapshot that cannot be used are logged and closed. Raises `ConfigError` if the environment is invalid.
    """
    inherited = Inherited.parse(environ, os.getpid())
    for name in VARIABLES:
        environ.pop(name, None)
    if inherited.manifest is None and not inherited.stored:
        return inherited, Snapshot()
    return inherited, _snapshot(inherited)


def release_stored() -> None:
    """Make systemd close its copies of descriptors, which would keep connections open that this process closes.

    Call it when the daemon is ready: until then, systemd passes the copies to another process if this one fails.
    """
    systemd.send(FDSTOREREMOVE="1", FDNAME=STORED_NAME)


def _snapshot(inherited: Inherited) -> Snapshot:
    manifest, bundle = b"", FdBundle()
    try:
        if inherited.manifest is not None:
            manifest = read_manifest(inherited.manifest)
            bundle, _ = adopt(fds_of(manifest))
        else:
            bundle, files = adopt(inherited.stored)
            for fd in files:
                manifest = read_manifest(fd)
        snapshot = unpack(manifest, bundle)
    except (OSError, ValueError) as error:
        log.warning("the saved state of the previous process cannot be used", reason=str(error))
        return Snapshot()
    finally:
        if unwanted := len(bundle.sockets):
            log.warning("closed sockets that are not in the saved state", sockets=unwanted)
        bundle.close()
    log.info("taken over", tunnels=len(snapshot.service.tunnels), connections=snapshot.relays)
    return snapshot
