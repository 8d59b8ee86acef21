"""What Prometheus may know, computed when it asks.

    tunneld_build_info{version}              1
    tunneld_uptime_seconds                   since the daemon started
    tunneld_ready                            1, or 0 while the daemon is being drained
    tunneld_tunnels{phase}                   open tunnels
    tunneld_tunnels_opened_total             tunnels, ever
    tunneld_visitors                         relayed now
    tunneld_visitors_waiting                 visitors that wait for a server connection
    tunneld_visitors_served_total            visitors that got a server connection, ever
    tunneld_visitors_refused_total{reason}   visitors turned away, ever: see `RefusalKind` in rules/admission.py
    tunneld_server_connections_parked        server connections that wait for a visitor
    tunneld_relayed_bytes_total{direction}   up (to hidden servers), down (to clients)
    tunneld_strangers                        control connections that have not authenticated
    tunneld_strangers_refused_total{reason}  turned away, ever: see `PreauthReason` in strangers.py
    tunneld_open_descriptors                 of this process
    tunneld_max_descriptors                  as many as it may have

Nothing in here names a tunnel, an owner or a visitor: metrics travel further than `list` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from tunneld.auth.preauth import PreauthLimiter, PreauthReason
from tunneld.control.verbs import DaemonControl
from tunneld.policy.admission import RefusalKind
from tunneld.tunnel.tunnel import Phase, Tunnel
from tunneld.wire.lines import Item

GAUGES = {
    "uptime": ("tunneld_uptime_seconds", "Seconds since the daemon started."),
    "visitors": ("tunneld_visitors", "Visitors that are relayed now."),
    "descriptors": ("tunneld_open_descriptors", "Descriptors that this process has open."),
    "max_descriptors": ("tunneld_max_descriptors", "Descriptors that this process may have open."),
}
COUNTERS = {
    "opened": ("tunneld_tunnels_opened", "Tunnels opened since the daemon started."),
    "served": ("tunneld_visitors_served", "Visitors that got a server connection since the daemon started."),
}
OPEN_PHASES = [phase.value for phase in Phase if phase is not Phase.CLOSED]


class TunneldCollector(Collector):
    """Reads the daemon whenever the registry is asked."""

    def __init__(self, daemon: DaemonControl, strangers: PreauthLimiter) -> None:
        self._daemon = daemon
        self._strangers = strangers

    def collect(self) -> Iterator[Metric]:
        """All families, in the order of the module's docstring, more or less."""
        status = self._daemon.status()
        yield InfoMetricFamily("tunneld_build", "The program.", {"version": str(status["version"])})
        ready = not self._daemon.service.draining
        yield GaugeMetricFamily("tunneld_ready", "Whether the daemon takes new tunnels.", int(ready))
        for key, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, _number(status, key))
        for key, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, _number(status, key))
        octets = CounterMetricFamily("tunneld_relayed_bytes", "Octets delivered.", labels=["direction"])
        for direction in ("up", "down"):
            octets.add_metric([direction], _number(status, direction))
        yield octets
        yield _refusals(self._daemon.service.refusals)
        yield from _of_strangers(self._strangers)
        yield from _of_tunnels(list(self._daemon.service.tunnels()))


def _refusals(counts: Mapping[RefusalKind, int]) -> Metric:
    text = "Visitors turned away since the daemon started."
    family = CounterMetricFamily("tunneld_visitors_refused", text, labels=["reason"])
    for reason in RefusalKind:
        family.add_metric([reason.value], counts[reason])
    return family


def _of_strangers(strangers: PreauthLimiter) -> Iterator[Metric]:
    text = "Control connections that have not authenticated."
    yield GaugeMetricFamily("tunneld_strangers", text, len(strangers))
    text = "Strangers turned away since the daemon started."
    family = CounterMetricFamily("tunneld_strangers_refused", text, labels=["reason"])
    for reason in PreauthReason:
        family.add_metric([reason.value], strangers.refusals[reason])
    yield family


def _of_tunnels(tunnels: Iterable[Tunnel]) -> Iterator[Metric]:
    phases = dict.fromkeys(OPEN_PHASES, 0)
    waiting = parked = 0
    for tunnel in tunnels:
        if tunnel.phase is not Phase.CLOSED:
            phases[tunnel.phase.value] += 1
        waiting += tunnel.waiting
        parked += tunnel.parked
    family = GaugeMetricFamily("tunneld_tunnels", "Open tunnels.", labels=["phase"])
    for phase, number in phases.items():
        family.add_metric([phase], number)
    yield family
    yield GaugeMetricFamily("tunneld_visitors_waiting", "Visitors that wait for a server connection.", waiting)
    text = "Server connections that wait for a visitor."
    yield GaugeMetricFamily("tunneld_server_connections_parked", text, parked)


def new_registry(daemon: DaemonControl, strangers: PreauthLimiter) -> CollectorRegistry:
    """A registry of our own: the library's default one describes the Python process as well."""
    registry = CollectorRegistry()
    registry.register(TunneldCollector(daemon, strangers))
    return registry


def answer_metrics(registry: CollectorRegistry) -> Response:
    """The exposition in Prometheus' text format."""
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _number(status: Item, key: str) -> float:
    return float(status[key] or 0)
