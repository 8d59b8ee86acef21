"""Whether the exposures of an agent are reachable: for probes, metrics and systemd.

`AgentStatus.observe` wraps the reporter of each exposure, and learns from its events. An exposure is *ready* from the
moment its tunnel is open until that or the relay is lost, or it stops. It is *settled* once it has been ready, or has
failed, for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tunneld.agent.events import Activity, Field, Reporter
from tunneld.policy.units import count

READY = frozenset({"opened", "resumed"})
"""The events after which visitors can come."""
NOT_READY = frozenset({"reconnecting", "draining", "ended", "closed"})
"""The events after which they cannot."""


class ObservedExposure:
    """The reporter of one exposure, and what its events say. Implements `Reporter`."""

    def __init__(
        self, name: str, reporter: Reporter, activity: Callable[[], Activity], on_change: Callable[[], object]
    ) -> None:
        self.name = name
        self.activity = activity
        self.address = ""
        """What visitors use, as the relay wrote it."""
        self.ports = ""
        """The public ports, if there are several."""
        self.ready = self.settled = False
        self.reason = ""
        """Why it is not ready."""
        self.healthy = True
        """What the health checks of the local server say, if there are any."""
        self._reporter = reporter
        self._on_change = on_change

    @property
    def wants_visitors(self) -> bool:
        """See `Reporter`."""
        return self._reporter.wants_visitors

    def report(self, event: str, /, **fields: Field) -> None:
        """See `Reporter`."""
        self._reporter.report(event, **fields)
        if event in READY:
            self.ready = self.settled = True
            self.address, self.reason = str(fields["address"]), ""
            self.ports = str(fields.get("ports", self.ports))
        elif event in NOT_READY:
            self.ready, self.settled = False, True
            self.reason = str(fields.get("reason", "stopping"))
        elif event in {"healthy", "unhealthy"}:
            self.healthy = event == "healthy"
        self._on_change()


class AgentStatus:
    """All exposures of this agent."""

    def __init__(self) -> None:
        self.on_change: list[Callable[[], object]] = []
        """Called after each event that may have changed something."""
        self._exposures: dict[str, ObservedExposure] = {}  # the latest one of each name

    def observe(self, name: str, reporter: Reporter, activity: Callable[[], Activity]) -> ObservedExposure:
        """Return a reporter that does what `reporter` does. A former exposure of this name does not count any more."""
        self._exposures[name] = observed = ObservedExposure(name, reporter, activity, self._changed)
        return observed

    def forget(self, name: str) -> None:
        """An exposure was removed from the configuration."""
        self._exposures.pop(name, None)
        self._changed()

    @property
    def exposures(self) -> Iterator[ObservedExposure]:
        """The latest exposure of each name."""
        return iter(self._exposures.values())

    @property
    def ready(self) -> bool:
        """Whether visitors can reach each of them."""
        return bool(self._exposures) and all(one.ready for one in self._exposures.values())

    @property
    def settled(self) -> bool:
        """Whether each of them has been ready or has failed."""
        return bool(self._exposures) and all(one.settled for one in self._exposures.values())

    def _changed(self) -> None:
        for call in self.on_change:
            call()

    def __str__(self) -> str:
        """`2 of 3 exposures are reachable, 4 visitors; files: control connection to the relay lost`."""
        exposures = list(self._exposures.values())
        ready = sum(one.ready for one in exposures)
        visitors = sum(one.activity().stats.now for one in exposures)
        text = f"{ready} of {count(len(exposures), 'exposure')} reachable, {count(visitors, 'visitor')}"
        first = next((one for one in exposures if not one.ready and one.reason), None)
        if first is None:
            return text
        return f"{text}; {first.name}: {first.reason}" if first.name else f"{text}; {first.reason}"
