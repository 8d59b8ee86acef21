"""How a daemon ends: it drains, or it hands everything that can go along to the next process; see handover/."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING

import structlog
import trio

from tunneld.control.verbs import count
from tunneld.daemon import systemd
from tunneld.directory.service import TunnelService
from tunneld.errors import ConfigError, reason_of

if sys.platform == "linux":
    from tunneld.daemon import handover

if TYPE_CHECKING:
    from tunneld.daemon.handover import Snapshot

log = structlog.get_logger("daemon")

PROGRESS = 5.0
"""Seconds between two words about a drain: a person sees that something happens, a log stays short."""

CHECKING = 30.0
"""Seconds for the program that is to follow to say that it would start: it reads the configuration and no more."""


class DaemonEnding(Enum):
    """What comes after this daemon."""

    DRAIN = "drain"
    "Nothing: relays may finish."
    BECOME = "become"
    "This process turns into the next daemon."
    STORE = "store"
    "systemd keeps what goes along, and starts the next daemon."


async def drain(service: TunnelService, drain_timeout: float) -> None:
    """Let relays finish, for so many seconds, and say how many are left."""
    systemd.stopping()
    with trio.move_on_after(drain_timeout) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell_progress, service, scope.deadline)
            await service.drain()
            nursery.cancel_scope.cancel()


async def _tell_progress(service: TunnelService, deadline: float) -> None:
    """To the log, to systemd and to whoever watches, every `PROGRESS` seconds until cancelled."""
    while True:
        tunnels = service.tunnels()
        facts = {
            "tunnels": len(tunnels),
            "visitors": sum(len(tunnel.visitors) for tunnel in tunnels),
            "seconds": round(deadline - trio.current_time()),
        }
        log.info("draining", **facts)
        service.events.publish("progress", **facts)
        systemd.status(f"draining: {count(facts['visitors'], 'visitor')} left, cut in {facts['seconds']} s")
        await trio.sleep(PROGRESS)


async def check_program(command: Sequence[str]) -> None:
    """Ask a program whether it would start. Raises `ConfigError`."""
    said = "it did not answer"
    try:
        with trio.move_on_after(CHECKING):
            done = await trio.run_process([*command, "--check"], capture_stdout=True, capture_stderr=True, check=False)
            if not done.returncode:
                return
            said = " ".join(done.stderr.decode(errors="replace").split("\n")[-3:]).strip()
    except OSError as error:
        said = f"{command[0]}: {reason_of(error)}"
    raise ConfigError([f"could not restart: the program as it is now would not start: {said}"])


def received(faces: Sequence[str]) -> tuple[Mapping[str, list[socket.socket]], Snapshot | None]:
    """Listeners that systemd gave, by face, and what a process before this one left. Raises `ConfigError`."""
    if sys.platform != "linux":
        return {}, None
    inherited, estate = handover.received(os.environ)
    return handover.check_given(inherited.given, faces), estate


def is_kept() -> bool:
    """Whether systemd is there and would keep what goes along."""
    return sys.platform == "linux" and handover.most_stored() > 0 and systemd.barrier()


async def hand_over(
    ending: DaemonEnding,
    command: Sequence[str],
    signals: Sequence[int],
    faces: Mapping[str, list[socket.socket]],
    given: frozenset[str],
    service: TunnelService,
) -> None:
    """Leave everything that can go along to the next process: by way of systemd, or by turning into `command`, and then
    this does not return. `faces` are the listeners, of which `given` are systemd's own.

    Raises `ShortageError` where the system does not let us; everything is lost then.
    """
    legacy = await service.export()
    for _ in range(3):  # carriers say goodbye
        await trio.lowlevel.checkpoint()
    most = handover.most_stored() if ending is DaemonEnding.STORE else sys.maxsize
    still_given = given if ending is DaemonEnding.BECOME else frozenset[str]()  # else systemd gives them again
    estate, baggage = handover.Snapshot(faces, still_given, legacy), handover.FdBundle(most)
    letter, closed = handover.pack(estate, baggage)
    cut = sum(one.cut for _owner, one in legacy.tunnels)
    facts = {"tunnels": len(legacy.tunnels), "relays": estate.relays, "cut": cut, "no_room": closed}
    log.info("handing over", to=ending.value, **facts)
    if ending is DaemonEnding.BECOME:
        handover.become(command, letter, baggage, signals)
    elif not handover.store(letter, baggage):
        log.error("systemd did not take what was to be kept; connections are lost")
