"""How the daemon ends: it drains, or it hands its connections over to the next process; see handover/."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING

import structlog
import trio

from tunneld import systemd
from tunneld.directory.service import TunnelService
from tunneld.errors import ConfigError, reason_of
from tunneld.policy.units import count

if sys.platform == "linux":
    from tunneld.daemon import handover

if TYPE_CHECKING:
    from tunneld.daemon.handover import Snapshot

log = structlog.get_logger("daemon")

PROGRESS_INTERVAL = 5.0
"""Seconds between two reports about a drain."""

FLUSH_TIMEOUT = 1.0
"""Seconds for the journals to be written before a handover: visitors wait meanwhile."""

CHECK_TIMEOUT = 30.0
"""Seconds for the new program of a restart to check its configuration with `--check`."""


class DaemonEnding(Enum):
    """What happens to the connections when the daemon ends."""

    DRAIN = "drain"
    "They may finish."
    BECOME = "become"
    "This process turns into the next daemon, which takes them over."
    STORE = "store"
    "systemd keeps them, and starts the next daemon, which takes them over."


async def drain(service: TunnelService, drain_timeout: float) -> None:
    """Wait until all connections have finished, for at most `drain_timeout` seconds, and report the progress."""
    systemd.stopping()
    with trio.move_on_after(drain_timeout) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_report_progress, service, scope.deadline)
            await service.drain()
            nursery.cancel_scope.cancel()


async def _report_progress(service: TunnelService, deadline: float) -> None:
    """Report to the log, to systemd and to `watch` clients every `PROGRESS_INTERVAL` seconds, until cancelled."""
    while True:
        tunnels = service.tunnels()
        facts = {
            "tunnels": len(tunnels),
            "visitors": sum(len(tunnel.visitors) for tunnel in tunnels),
            "seconds": round(deadline - trio.current_time()),
        }
        log.info("draining", **facts)
        service.events.publish("progress", **facts)
        visitors = count(facts["visitors"], "visitor")
        systemd.status(f"stopping: {visitors} still connected, disconnecting in {facts['seconds']} s")
        await trio.sleep(PROGRESS_INTERVAL)


async def check_program(command: Sequence[str]) -> None:
    """Run the program with `--check`, to find out whether it would start. Raises `ConfigError` if not."""
    reason = f"it did not answer within {CHECK_TIMEOUT:g} s"
    try:
        with trio.move_on_after(CHECK_TIMEOUT):
            done = await trio.run_process([*command, "--check"], capture_stdout=True, capture_stderr=True, check=False)
            if not done.returncode:
                return
            reason = " ".join(done.stderr.decode(errors="replace").split("\n")[-3:]).strip()
    except OSError as error:
        reason = f"{command[0]}: {reason_of(error)}"
    raise ConfigError([f"could not restart: the new program would not start: {reason}"])


def receive(services: Sequence[str]) -> tuple[Mapping[str, list[socket.socket]], Snapshot | None]:
    """Return the listeners that systemd opened, by service, and the snapshot of the previous process.

    `services` are the enabled ones. Raises `ConfigError`.
    """
    if sys.platform != "linux":
        return {}, None
    inherited, snapshot = handover.receive(os.environ)
    return handover.adopt_listeners(inherited.activated, services), snapshot


def can_store() -> bool:
    """Whether systemd is running and would keep connections for the next process."""
    return sys.platform == "linux" and handover.store_capacity() > 0 and systemd.barrier()


async def hand_over(
    ending: DaemonEnding,
    command: Sequence[str],
    signals: Sequence[int],
    listeners: Mapping[str, list[socket.socket]],
    activated: frozenset[str],
    service: TunnelService,
    flush: Callable[[], Awaitable[None]],
) -> None:
    """Hand over everything that can be kept, by way of systemd or by turning into `command` (which does not return).

    `listeners` are those of the servers, by service; `activated` are the services with listeners of systemd. `flush`
    writes the journals.

    Raises `ShortageError` if the system refuses; then all connections are lost.
    """
    tunnels = await service.export()
    for _ in range(3):  # lets carriers write their last frames
        await trio.lowlevel.checkpoint()
    with trio.move_on_after(FLUSH_TIMEOUT):
        await flush()
    capacity = handover.store_capacity() if ending is DaemonEnding.STORE else sys.maxsize
    still_activated = activated if ending is DaemonEnding.BECOME else frozenset[str]()  # systemd passes them again
    snapshot, bundle = handover.Snapshot(listeners, still_activated, tunnels), handover.FdBundle(capacity)
    manifest, closed = handover.pack(snapshot, bundle)
    cut = sum(tunnel.cut for _credential, tunnel in tunnels.tunnels)
    facts = {"tunnels": len(tunnels.tunnels), "connections": snapshot.relays, "cut": cut, "no_room": closed}
    log.info("handing over", to=ending.value, **facts)
    if ending is DaemonEnding.BECOME:
        handover.become(command, manifest, bundle, signals)
    elif not handover.store(manifest, bundle):
        log.error("systemd did not accept the connections to keep; they are lost")
