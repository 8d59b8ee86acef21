"""The metrics for Prometheus, computed at each scrape.

    tunneld_build_info{version}              1
    tunneld_uptime_seconds                   since the daemon started
    tunneld_ready                            1, or 0 while the daemon is draining
    tunneld_tunnels{phase}                   open tunnels
    tunneld_tunnels_opened_total             tunnels opened since the start
    tunneld_visitors                         visitors connected to a hidden server
    tunneld_visitors_waiting                 visitors that wait for a server connection
    tunneld_visitors_served_total            visitors that got a server connection since the start
    tunneld_visitors_refused_total{reason}   visitors refused since the start: see `RefusalKind` in policy/admission.py
    tunneld_server_connections_parked        server connections that wait for a visitor
    tunneld_relayed_bytes_total{direction}   up (to hidden servers), down (to clients)
    tunneld_strangers                        connections that have not authenticated
    tunneld_strangers_refused_total{reason}  such connections refused since the start: see `PreauthReason` in
                                             auth/preauth.py
    tunneld_open_descriptors                 of this process
    tunneld_max_descriptors                  the limit of this process

    tunneld_mail_messages                    messages that wait for EGTP nodes
    tunneld_mail_bytes                       their bytes, and 512 for each
    tunneld_mail_passed_total                messages accepted for a node since the start
    tunneld_mail_delivered_total             of these, fetched or acknowledged
    tunneld_mail_expired_total               of these, deleted because nothing fetched them
    tunneld_mail_refused_total{reason}       messages refused since the start: see `MailRefusal` in egtp/mailbox.py

    tunneld_certificate_expires_seconds{name}  until the certificate with this first name expires
    tunneld_certificate_problems             host names that have no valid certificate, although they should
    tunneld_cpu_seconds_total{mode}          of this process
    tunneld_resident_memory_bytes            of this process
    tunneld_event_loop_delay_seconds         histogram: how late the event loop wakes its tasks
    tunneld_reservations                     reserved addresses
    tunneld_reservations_stored              1, or 0 while they are in memory only
    tunneld_events_lost_total                events that could not be kept
    tunneld_records_lost_total               records of visitors that could not be written

Those of single tunnels are in tunnel_metrics.py. No metric names a visitor. Names in certificates are public: every
authority publishes them in the logs of certificate transparency.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tunneld.auth.preauth import PreauthLimiter, PreauthReason
from tunneld.control.verbs import DaemonControl
from tunneld.directory.reply import Step
from tunneld.directory.service import TunnelService
from tunneld.egtp.mailbox import MailRefusal
from tunneld.egtp.passing import PassingService
from tunneld.http.responses import LongResponse
from tunneld.http.tunnel_metrics import tunnel_metrics
from tunneld.policy.admission import RefusalKind
from tunneld.tunnel.tunnel import Phase, Tunnel
from tunneld.wire.lines import Item

GAUGES = {
    "uptime": ("tunneld_uptime_seconds", "Seconds since the daemon started."),
    "visitors": ("tunneld_visitors", "Visitors connected to a hidden server."),
    "descriptors": ("tunneld_open_descriptors", "File descriptors that this process has open."),
    "max_descriptors": ("tunneld_max_descriptors", "File descriptors that this process may have open."),
}
"""Gauges that are keys of `status`: name and help text."""
COUNTERS = {
    "opened": ("tunneld_tunnels_opened", "Tunnels opened since the daemon started."),
    "served": ("tunneld_visitors_served", "Visitors that got a server connection since the daemon started."),
}
"""Counters that are keys of `status`: name and help text."""
OPEN_PHASES = [phase.value for phase in Phase if phase is not Phase.CLOSED]


class TunneldCollector(Collector):
    """Reads the metrics from the daemon whenever the registry is scraped."""

    def __init__(self, daemon: DaemonControl, preauth: PreauthLimiter) -> None:
        self._daemon = daemon
        self._preauth = preauth

    def collect(self) -> Iterator[Metric]:
        """All metric families."""
        status = self._daemon.status()
        yield InfoMetricFamily("tunneld_build", "The program.", {"version": str(status["version"])})
        ready = not self._daemon.service.draining
        yield GaugeMetricFamily("tunneld_ready", "Whether the daemon accepts new tunnels.", int(ready))
        for key, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, _number(status, key))
        for key, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, _number(status, key))
        relayed = CounterMetricFamily("tunneld_relayed_bytes", "Bytes delivered.", labels=["direction"])
        for direction in ("up", "down"):
            relayed.add_metric([direction], _number(status, direction))
        yield relayed
        yield _visitor_refusals(self._daemon.service.live.refusals)
        yield from _preauth_metrics(self._preauth)
        yield from _tunnel_metrics(list(self._daemon.service.tunnels()))
        if (mail := self._daemon.mail) is not None:
            yield from _mail_metrics(mail)
        yield _certificate_metric(self._daemon.certificates.seconds_left())
        text, problems = "Host names without a valid certificate.", self._daemon.certificate_orders.problems()
        yield GaugeMetricFamily("tunneld_certificate_problems", text, len(problems))
        yield from _process_metrics()
        yield from _service_metrics(self._daemon.service)


def _visitor_refusals(counts: Mapping[RefusalKind, int]) -> Metric:
    text = "Visitors refused since the daemon started."
    family = CounterMetricFamily("tunneld_visitors_refused", text, labels=["reason"])
    for reason in RefusalKind:
        family.add_metric([reason.value], counts[reason])
    return family


def _preauth_metrics(preauth: PreauthLimiter) -> Iterator[Metric]:
    text = "Connections that have not authenticated, on all ports that require it."
    yield GaugeMetricFamily("tunneld_strangers", text, len(preauth))
    text = "Unauthenticated connections refused since the daemon started."
    family = CounterMetricFamily("tunneld_strangers_refused", text, labels=["reason"])
    for reason in PreauthReason:
        family.add_metric([reason.value], preauth.refusals[reason])
    yield family


def _tunnel_metrics(tunnels: Iterable[Tunnel]) -> Iterator[Metric]:
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
    text = "Idle server connections that wait for a visitor."
    yield GaugeMetricFamily("tunneld_server_connections_parked", text, parked)


def _mail_metrics(mail: PassingService) -> Iterator[Metric]:
    stored = mail.mailboxes.total
    yield GaugeMetricFamily("tunneld_mail_messages", "Messages that wait for EGTP nodes.", stored.messages)
    yield GaugeMetricFamily("tunneld_mail_bytes", "Bytes of messages that wait for EGTP nodes.", stored.bytes)
    yield CounterMetricFamily("tunneld_mail_passed", "Messages accepted for an EGTP node.", mail.passed)
    yield CounterMetricFamily("tunneld_mail_delivered", "Messages that EGTP nodes have got.", mail.delivered)
    yield CounterMetricFamily("tunneld_mail_expired", "Messages deleted because no EGTP node got them.", mail.expired)
    family = CounterMetricFamily("tunneld_mail_refused", "Messages of EGTP nodes refused.", labels=["reason"])
    for reason in MailRefusal:
        family.add_metric([reason.value], mail.refused[reason])
    yield family


def _certificate_metric(seconds_left: Mapping[str, float]) -> Metric:
    text = "Seconds until the certificate with this first name expires."
    family = GaugeMetricFamily("tunneld_certificate_expires_seconds", text, labels=["name"])
    for name, seconds in seconds_left.items():
        family.add_metric([name], seconds)
    return family


def _process_metrics() -> Iterator[Metric]:
    times = os.times()
    family = CounterMetricFamily("tunneld_cpu_seconds", "Processor time of this process.", labels=["mode"])
    family.add_metric(["user"], times.user)
    family.add_metric(["system"], times.system)
    yield family
    text = "Memory of this process that is resident."
    yield GaugeMetricFamily("tunneld_resident_memory_bytes", text, _resident())


def _resident() -> int:
    """Bytes; elsewhere than on Linux the largest number so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _service_metrics(service: TunnelService) -> Iterator[Metric]:
    text, delay = "How late the event loop wakes its tasks.", service.loop_delay
    yield HistogramMetricFamily("tunneld_event_loop_delay_seconds", text, buckets=delay.buckets, sum_value=delay.total)
    reservations = service.reservations
    yield GaugeMetricFamily("tunneld_reservations", "Reserved addresses.", len(reservations.table))
    text, stored = "Whether reservations are stored on disk.", reservations.place != "memory"
    yield GaugeMetricFamily("tunneld_reservations_stored", text, int(stored))
    lost_events = service.history.lost if service.history is not None else 0
    yield CounterMetricFamily("tunneld_events_lost", "Events that could not be kept.", lost_events)
    lost_records = service.records.lost if service.records is not None else 0
    yield CounterMetricFamily("tunneld_records_lost", "Records of visitors that could not be written.", lost_records)


def new_registry(daemon: DaemonControl, preauth: PreauthLimiter) -> CollectorRegistry:
    """A registry of our own: the library's default registry also describes the Python process."""
    registry = CollectorRegistry()
    registry.register(TunneldCollector(daemon, preauth))
    return registry


async def answer_metrics(registry: CollectorRegistry, daemon: DaemonControl, step: Step) -> LongResponse:
    """The metrics in the text format of Prometheus, made in steps."""
    async with step():
        whole = generate_latest(registry)
    return LongResponse([whole, *await tunnel_metrics(daemon, step)], CONTENT_TYPE_LATEST)


def _number(status: Item, key: str) -> float:
    return float(status[key] or 0)
