"""The two ways to the next process, and the way in.

become     execve: the same process id, another program; descriptors stay open under their numbers
store      systemd keeps them (FDSTORE=1) while this process ends and another one starts
received   what came along, by either way
"""

from __future__ import annotations

import os
import signal
from collections.abc import MutableMapping, Sequence

import structlog

from tunneld.daemon import systemd
from tunneld.daemon.handover.bundle import FdBundle, adopt, read_manifest, write_manifest
from tunneld.daemon.handover.inherited import MANIFEST, STORED, Inherited
from tunneld.daemon.handover.snapshot import Snapshot, fds_of, unpack
from tunneld.errors import ShortageError, reason_of

log = structlog.get_logger("handover")

ASKED = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", MANIFEST)
"""The variables of the way in: read once, and of no use to children."""
BATCH = 200
"""Descriptors in one message to systemd; the kernel takes 253 (SCM_MAX_FD)."""
MOST_STORED = 16_384
"""Descriptors that systemd is given where it does not say how many it takes: their names, `kept:` each, must fit into
the one environment variable (128 KiB) by which they come back. FileDescriptorStoreMax= of the unit is the same.
"""


def become(command: Sequence[str], letter: bytes, baggage: FdBundle, signals: Sequence[int]) -> None:
    """Turn this process into `command`, which finds the letter. Does not return; raises `ShortageError` where the
    system refuses, and then everything that was in the baggage is closed.

    `signals` are held back until the new program takes them: a moment without a handler would be its end.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ASKED}
    try:
        fd = write_manifest(letter, baggage.held)
        for one in baggage.sockets:
            one.set_inheritable(True)
        os.set_inheritable(fd, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        os.execve(command[0], list(command), {**environment, MANIFEST: f"{os.getpid()}:{fd}"})
    except OSError as error:
        raise ShortageError(f"could not start {command[0]} again, connections are lost: {reason_of(error)}") from None
    finally:
        baggage.close()


def most_stored() -> int:
    """How many sockets systemd keeps for us, beside the letter; 0 where there is no systemd that does."""
    told = os.environ.get("FDSTORE", "")  # since systemd 254; without it we know no better than the unit that we ship
    most = int(told) if told.isascii() and told.isdigit() else MOST_STORED
    return min(most, MOST_STORED) - 1 if systemd.is_heard() else 0


def store(letter: bytes, baggage: FdBundle) -> bool:
    """Give everything to systemd to keep for the next process; whether it has it. What was in the baggage is closed."""
    try:
        fd = write_manifest(letter, baggage.held)
    except OSError:
        baggage.close()
        return False
    try:
        fds = [fd, *(one.fileno() for one in baggage.sockets)]
        for start in range(0, len(fds), BATCH):
            if not systemd.send(fds[start : start + BATCH], FDSTORE="1", FDNAME=STORED, FDPOLL="0"):
                return False
        return systemd.barrier()
    finally:
        os.close(fd)
        baggage.close()


def received(environ: MutableMapping[str, str]) -> tuple[Inherited, Snapshot]:
    """What came along, and what systemd gave of its own. Raises `ConfigError` where the environment makes no sense.

    Whatever does not fit is closed and said; the daemon starts all the same.
    """
    inherited = Inherited.parse(environ, os.getpid())
    for name in ASKED:
        environ.pop(name, None)
    if inherited.letter is None and not inherited.stored:
        return inherited, Snapshot()
    return inherited, _estate(inherited)


def settle() -> None:
    """From now on all of it is ours alone: systemd's copies would keep connections open that we close. Until then
    another try finds them, should this one not get as far.
    """
    systemd.send(FDSTOREREMOVE="1", FDNAME=STORED)


def _estate(inherited: Inherited) -> Snapshot:
    letter, baggage = b"", FdBundle()
    try:
        if inherited.letter is not None:
            letter = read_manifest(inherited.letter)
            baggage, _ = adopt(fds_of(letter))
        else:
            baggage, letters = adopt(inherited.stored)
            for fd in letters:
                letter = read_manifest(fd)
        estate = unpack(letter, baggage)
    except (OSError, ValueError) as error:
        log.warning("what the process before this one left cannot be used", reason=str(error))
        return Snapshot()
    finally:
        if unwanted := len(baggage.sockets):
            log.warning("sockets came along that nothing is known of, and were closed", sockets=unwanted)
        baggage.close()
    log.info("taken over", tunnels=len(estate.service.tunnels), relays=estate.relays)
    return estate
