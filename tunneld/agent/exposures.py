"""Several exposures in one process, whose number and plans may change while they run.

    fleet
    ├─ engine         every byte of all exposures: one epoll set, one set of buffers and pipes for the process
    ├─ NAME ×N        one exposure after another: the next one when its plan changed, and the former has left the relay
    └─ exposure ×N    those of NAME now, and former ones whose visitors finish (see expose.py)

An exposure that fails for good ends alone, and takes what it has in the engine along. The fleet ends when the last of
them has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.config import Changes, ExposureConfig, changes
from tunneld.agent.events import Reporter, Stats
from tunneld.agent.expose import Exposure, open_exposure
from tunneld.agent.network import NetworkMonitor
from tunneld.engine import new_engine
from tunneld.engine.limits import POLL_TIMEOUT
from tunneld.errors import TunneldError


@dataclass(frozen=True, slots=True)
class ExposureSpec:
    """What one exposure is to be, and at which relay."""

    config: ExposureConfig
    relay: RelayAccess


class Exposures:
    """The exposures that are wanted, and those that run."""

    def __init__(
        self, teller_of: Callable[[str, ExposureConfig, Callable[[], Stats]], Reporter], wake: NetworkMonitor
    ) -> None:
        """`teller_of` makes the teller of a named exposure each time that it begins, and gets how that one is doing."""
        self.failures: dict[str, TunneldError] = {}
        """What those failed with that failed for good, by name."""
        self._teller_of = teller_of
        self._wake = wake
        self._engine = new_engine(poll_timeout=POLL_TIMEOUT)
        self._wanted: dict[str, ExposureSpec] = {}
        self._tasks: set[str] = set()  # names that are served
        self._exposures: dict[Exposure, tuple[str, ExposureConfig]] = {}  # also those that let their visitors finish
        self._draining = ""  # why
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()

    async def run(self, wanted: Mapping[str, ExposureSpec]) -> None:
        """Expose until the last one has ended."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._engine.run)
            self._nursery = nursery
            self.apply(wanted)
            await self._ended.wait()
            nursery.cancel_scope.cancel()

    def drain(self, reason: str) -> None:
        """End when those who are being served have finished, each exposure after its `drain_timeout` at the latest."""
        self._draining = reason
        self._wanted = {}
        for exposure, (_, plan) in self._exposures.items():
            exposure.drain(reason, plan.drain_timeout)
        self._end_if_empty()

    def apply(self, wanted: Mapping[str, ExposureSpec]) -> Changes:
        """Open, close and replace, until exactly `wanted` runs; nothing, where the fleet has ended. Never waits: the
        visitors of those that go may finish.

        An exposure that failed for good is tried again, one whose time was over is not.
        """
        if self._nursery is None or self._ended.is_set() or self._draining:
            return Changes()
        made = changes(self._wanted, wanted)
        kept = self._wanted.keys() - made.replaced
        self._wanted = {  # what is new is a new object, also where it is like one that is just being closed
            name: self._wanted[name] if name in kept else replace(berth) for name, berth in wanted.items()
        }
        gone = dict.fromkeys(made.removed, "no longer wanted") | dict.fromkeys(made.replaced, "wanted in another way")
        for exposure, (name, plan) in self._exposures.items():
            if name in gone:
                exposure.drain(gone[name], plan.drain_timeout)
        for name in (*gone, *made.added):
            self.failures.pop(name, None)
            if name in wanted and name not in self._tasks:
                self._tasks.add(name)
                self._nursery.start_soon(self._serve, name, self._nursery)
        self._end_if_empty()
        return made

    async def _serve(self, name: str, nursery: trio.Nursery) -> None:
        """One exposure after another, as long as what is wanted changes. A tunnel of the same name would cut those whom
        the former serves, so it comes when the relay has closed that to new visitors; its address is free then.
        """
        berth = None
        while (wanted := self._wanted.get(name)) is not None and wanted is not berth:
            berth, left = wanted, trio.Event()
            nursery.start_soon(self._expose, name, berth, left)
            await left.wait()
        self._tasks.discard(name)
        self._end_if_empty()

    async def _expose(self, name: str, berth: ExposureSpec, left: trio.Event) -> None:
        """One exposure; `left` is set once the relay sends it nobody any more."""
        plan, running = berth.config, list[Exposure]()
        teller = self._teller_of(name, plan, lambda: running[0].figures if running else Stats())
        try:
            async with open_exposure(
                plan, berth.relay, teller, self._engine, self._wake, patient=True, on_left=left.set
            ) as exposure:
                running.append(exposure)
                self._exposures[exposure] = name, plan
                if self._wanted.get(name) is not berth:
                    exposure.stop(self._draining or "no longer wanted")
                await exposure.run()
        except* TunneldError as group:
            error = _first(group)
            if self._wanted.get(name) is berth:
                self.failures[name] = error
                del self._wanted[name]
            teller.report("ended", reason=str(error))
        finally:
            for exposure in running:
                del self._exposures[exposure]
            left.set()
            self._end_if_empty()

    def _end_if_empty(self) -> None:
        if not (self._tasks or self._exposures):
            self._ended.set()


def _first(error: TunneldError | BaseExceptionGroup[TunneldError]) -> TunneldError:
    """The first exception inside the groups that nurseries make."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
