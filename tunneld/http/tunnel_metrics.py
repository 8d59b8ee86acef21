"""The metrics of single tunnels, with the labels `id`, `name` and `owner`: made in steps, so that no scrape holds up
visitors.

    tunneld_tunnel_up                               1 while a hidden server is connected and answers
    tunneld_tunnel_visitors                         visitors connected to it
    tunneld_tunnel_visitors_served_total            visitors that got a server connection
    tunneld_tunnel_visitors_refused_total{reason}   visitors refused; only reasons that there were
    tunneld_tunnel_relayed_bytes_total{direction}   up (to hidden servers), down (to clients)
    tunneld_tunnels_left_out                        open tunnels that are not among them: `metrics.max_tunnels`

They end with their tunnel. Of more tunnels than `metrics.max_tunnels`, the oldest are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tunneld.control.verbs import DaemonControl
from tunneld.directory.reply import Step
from tunneld.tunnel.tunnel import Phase, Tunnel

LABELS = ("id", "name", "owner")
TUNNELS_PER_STEP = 16
"""Tunnels that are formatted without a break: about a millisecond."""
HEAD_LINES = 2
"""Lines before the samples of a family, HELP and TYPE. A family has them once, and samples of many tunnels."""


@dataclass(frozen=True, slots=True)
class TunnelFacts:
    """The numbers of one tunnel at the moment of the scrape."""

    labels: Sequence[str]
    up: bool
    visitors: int
    served: int
    octets: tuple[int, int]
    refused: Sequence[tuple[str, int]] = field(default=())  # by reason

    @classmethod
    def of(cls, tunnel: Tunnel) -> TunnelFacts:
        """The present numbers of a tunnel."""
        spec = tunnel.spec
        refused = [(kind.value, count) for kind, count in tunnel.refusals.items() if count]
        labels = (tunnel.id, spec.options.name, spec.credential)
        return cls(labels, tunnel.phase is Phase.READY, len(tunnel.visitors), tunnel.served, tunnel.octets, refused)


Fill = Callable[[Iterable[TunnelFacts]], Metric]
"""Makes a family with samples of these tunnels."""


def _up(tunnels: Iterable[TunnelFacts]) -> Metric:
    text = "Whether a hidden server of the tunnel is connected and answers."
    family = GaugeMetricFamily("tunneld_tunnel_up", text, labels=LABELS)
    for one in tunnels:
        family.add_metric(one.labels, int(one.up))
    return family


def _visitors(tunnels: Iterable[TunnelFacts]) -> Metric:
    family = GaugeMetricFamily("tunneld_tunnel_visitors", "Visitors connected to the tunnel.", labels=LABELS)
    for one in tunnels:
        family.add_metric(one.labels, one.visitors)
    return family


def _served(tunnels: Iterable[TunnelFacts]) -> Metric:
    text = "Visitors of the tunnel that got a server connection."
    family = CounterMetricFamily("tunneld_tunnel_visitors_served", text, labels=LABELS)
    for one in tunnels:
        family.add_metric(one.labels, one.served)
    return family


def _refused(tunnels: Iterable[TunnelFacts]) -> Metric:
    text = "Visitors of the tunnel that were refused."
    family = CounterMetricFamily("tunneld_tunnel_visitors_refused", text, labels=(*LABELS, "reason"))
    for one in tunnels:
        for reason, count in one.refused:
            family.add_metric((*one.labels, reason), count)
    return family


def _relayed(tunnels: Iterable[TunnelFacts]) -> Metric:
    text = "Bytes delivered by the tunnel."
    family = CounterMetricFamily("tunneld_tunnel_relayed_bytes", text, labels=(*LABELS, "direction"))
    for one in tunnels:
        for direction, octets in zip(("up", "down"), one.octets, strict=True):
            family.add_metric((*one.labels, direction), octets)
    return family


FAMILIES: Sequence[Fill] = (_up, _visitors, _served, _refused, _relayed)


async def tunnel_metrics(daemon: DaemonControl, step: Step) -> Sequence[bytes]:
    """The parts of the text."""
    tunnels, limit = daemon.service.tunnels(), daemon.settings.metrics.max_tunnels
    text = "Open tunnels without metrics of their own."
    left_out = GaugeMetricFamily("tunneld_tunnels_left_out", text, max(0, len(tunnels) - limit))
    facts: list[TunnelFacts] = []
    for first in range(0, min(limit, len(tunnels)), TUNNELS_PER_STEP):
        async with step():
            chosen = tunnels[first : min(limit, first + TUNNELS_PER_STEP)]
            facts += [TunnelFacts.of(tunnel) for tunnel in chosen if tunnel.phase is not Phase.CLOSED]
    parts = [_text(left_out)]
    for fill in FAMILIES:
        for first in range(0, max(1, len(facts)), TUNNELS_PER_STEP):
            async with step():
                part = _text(fill(facts[first : first + TUNNELS_PER_STEP]))
            parts.append(part.split(b"\n", HEAD_LINES)[HEAD_LINES] if first else part)
    return parts


class _OneFamily(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def _text(family: Metric) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OneFamily(family))
    return generate_latest(registry)
