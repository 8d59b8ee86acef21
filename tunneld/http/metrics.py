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

No metric names a tunnel, an owner or a visitor: metrics are passed on more widely than the output of `list`. Names in
certificates are public: every authority publishes them in the logs of certificate transparency.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from tunneld.auth.preauth import PreauthLimiter, PreauthReason
from tunneld.control.verbs import DaemonControl
from tunneld.egtp.mailbox import MailRefusal
from tunneld.egtp.passing import PassingService
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


def new_registry(daemon: DaemonControl, preauth: PreauthLimiter) -> CollectorRegistry:
    """A registry of our own: the library's default registry also describes the Python process."""
    registry = CollectorRegistry()
    registry.register(TunneldCollector(daemon, preauth))
    return registry


def answer_metrics(registry: CollectorRegistry) -> Response:
    """The metrics in the text format of Prometheus."""
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _number(status: Item, key: str) -> float:
    return float(status[key] or 0)
