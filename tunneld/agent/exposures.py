"""Several exposures in one process; a reload may add, remove and replace them while they run.

    exposures
    ├─ engine         moves the bytes of all exposures: one epoll set, one set of buffers and pipes for the process
    ├─ relay ×R       the control connection to each relay and its carriers, see relay_connection.py
    ├─ NAME ×N        runs one exposure after another: a replacement starts when the relay sends its predecessor no more
    │                 visitors
    └─ exposure ×N    the present one of each NAME, and former ones whose visitors finish (see expose.py)

An exposure that fails permanently, or by a bug, ends alone and removes what it has in the engine. `run` ends with the
last exposure.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.config import Changes, ExposureConfig, changes
from tunneld.agent.events import Activity, Reporter
from tunneld.agent.expose import Exposure, open_exposure
from tunneld.agent.local import ListeningSockets
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.relay_connection import RelayConnection
from tunneld.engine import new_engine
from tunneld.engine.limits import POLL_TIMEOUT
from tunneld.errors import LocalProtocolError, TunneldError

if TYPE_CHECKING:
    from tunneld.agent.inspection import Inspectors

ReporterFactory = Callable[[str, ExposureConfig, Callable[[], Activity]], Reporter]
"""Makes the reporter of an exposure from its name, its configuration, and a function that returns what it does."""


@dataclass(frozen=True, slots=True)
class ExposureSpec:
    """The configuration of one exposure, and its relay."""

    config: ExposureConfig
    relay: RelayAccess


class Exposures:
    """The configured exposures, and the running ones."""

    def __init__(self, new_reporter: ReporterFactory, monitor: NetworkMonitor) -> None:
        """`new_reporter` is called each time an exposure starts. The caller runs the `monitor`."""
        self.failures: dict[str, TunneldError] = {}
        """The errors of the exposures that failed permanently, by name."""
        self.engine = new_engine(poll_timeout=POLL_TIMEOUT)
        """Moves the bytes of all exposures; `run` runs it."""
        self._new_reporter = new_reporter
        self._monitor = monitor
        self._specs: dict[str, ExposureSpec] = {}  # by name, as last applied
        self._tasks: set[str] = set()  # names that have a task
        self._running: dict[Exposure, tuple[str, ExposureConfig]] = {}  # also former ones whose visitors finish
        self._drain_reason = ""  # once draining
        self._relays: list[RelayConnection] = []
        self._sockets = ListeningSockets()
        self._nursery: trio.Nursery | None = None
        self._inspectors: Inspectors | None = None  # once an exposure wants one
        self._ended = trio.Event()

    async def run(self, specs: Mapping[str, ExposureSpec]) -> None:
        """Run these exposures, and what `apply` makes of them, until the last one has ended."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.engine.run)
            self._nursery = nursery
            self.apply(specs)
            await self._ended.wait()
            nursery.cancel_scope.cancel()

    def drain(self, reason: str) -> None:
        """Take no new visitors, and end when the present ones have finished, each exposure after its `drain_timeout`
        at the latest.
        """
        self._drain_reason = reason
        self._specs = {}
        for exposure, (_, config) in self._running.items():
            exposure.drain(reason, config.drain_timeout)
        self._end_if_empty()

    def apply(self, specs: Mapping[str, ExposureSpec]) -> Changes:
        """Open, close and replace exposures until exactly `specs` run. Returns the changes; does nothing once `run` has
        ended or `drain` was called. Never blocks: visitors of closed exposures may finish.

        An exposure that failed permanently is tried again. One that expired (`ttl`) is not.
        """
        if self._nursery is None or self._ended.is_set() or self._drain_reason:
            return Changes()
        made = changes(self._specs, specs)
        unchanged = self._specs.keys() - made.replaced
        self._specs = {  # compared by identity below, so a new spec is a new object even if it equals one being closed
            name: self._specs[name] if name in unchanged else replace(spec) for name, spec in specs.items()
        }
        closing = dict.fromkeys(made.removed, "removed from the configuration")
        closing |= dict.fromkeys(made.replaced, "configuration changed")
        for exposure, (name, config) in self._running.items():
            if name in closing:
                exposure.drain(closing[name], config.drain_timeout)
        for name in (*closing, *made.added):
            self.failures.pop(name, None)
            if name in specs and name not in self._tasks:
                self._tasks.add(name)
                self._nursery.start_soon(self._run_name, name, self._nursery)
        self._end_if_empty()
        return made

    async def _run_name(self, name: str, nursery: trio.Nursery) -> None:
        """Run the exposures of one name, one after another, as long as its spec changes.

        A tunnel of the same name would drop the visitors of the former one. So the next exposure starts once the relay
        has closed the former tunnel to new visitors; by then the address is free.
        """
        current = None
        while (spec := self._specs.get(name)) is not None and spec is not current:
            current, withdrawn = spec, trio.Event()
            nursery.start_soon(self._run_exposure, name, spec, withdrawn)
            await withdrawn.wait()
        self._tasks.discard(name)
        self._end_if_empty()

    async def _run_exposure(self, name: str, spec: ExposureSpec, withdrawn: trio.Event) -> None:
        """Run one exposure; sets `withdrawn` once the relay sends it no more visitors."""
        config, opened = spec.config, list[Exposure]()
        reporter = self._new_reporter(name, config, lambda: opened[0].activity if opened else Activity())
        try:
            relay = self._relay(spec.relay)
            async with open_exposure(
                config,
                relay,
                reporter,
                self.engine,
                self._monitor,
                on_withdrawn=withdrawn.set,
                sockets=self._sockets,
                inspectors=self._shared_inspectors(config),
            ) as exposure:
                opened.append(exposure)
                self._running[exposure] = name, config
                if self._specs.get(name) is not spec:
                    exposure.stop(self._drain_reason or "removed from the configuration")
                await exposure.run()
        except* Exception as group:
            error = _first_error(group)
            if self._specs.get(name) is spec:
                self.failures[name] = error
                del self._specs[name]
            reporter.report("ended", reason=str(error))
        finally:
            for exposure in opened:
                del self._running[exposure]
            withdrawn.set()
            self._end_if_empty()

    def _relay(self, access: RelayAccess) -> RelayConnection:
        """The control connection for exposures with this access; its task is started with the first of them."""
        assert self._nursery is not None
        self._relays = [relay for relay in self._relays if relay.in_use]
        for relay in self._relays:
            if relay.access is access:
                return relay
        relay = RelayConnection(access, self._monitor, patient=True)
        self._relays.append(relay)
        self._nursery.start_soon(relay.run)
        return relay

    def _shared_inspectors(self, config: ExposureConfig) -> Inspectors | None:
        """The inspectors of this process, for an exposure that wants one."""
        if config.inspect is not None and self._inspectors is None:
            from tunneld.agent.inspection import Inspectors  # noqa: PLC0415 - h11, for the few

            assert self._nursery is not None
            self._inspectors = Inspectors(self._nursery)
        return self._inspectors

    def _end_if_empty(self) -> None:
        if not (self._tasks or self._running):
            self._ended.set()


def _first_error(error: Exception) -> TunneldError:
    """The first exception inside nested exception groups, which nurseries make. A bug becomes an error that says where
    it is.
    """
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TunneldError):
        return error
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return LocalProtocolError(f"a bug in the agent, please report it: {type(error).__name__}: {error} ({where})")
