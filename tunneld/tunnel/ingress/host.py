"""A host name on the shared HTTP and TLS ports.

The ports find this ingress in the relay's table of names, and pass requests to it as streams, which the tunnel relays
like any visitor. While the tunnel of the same name that it replaces still serves, requests go to that one; between the
last moment of the one and the first of the other they wait here, as connections wait in the queue of a listener.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import structlog
import trio

from tunneld.engine.engine import Engine, FailureCallback
from tunneld.net.address import Address, HostName
from tunneld.net.endpoint import Peer
from tunneld.policy.admission import AdmissionRefusal, NetworkRules, RefusalKind
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.sites.access import refused
from tunneld.sites.fields import HostRewrite, Origin
from tunneld.sites.guard import GuardRules, SiteGuard
from tunneld.sites.names import SharedNames
from tunneld.sites.pages import https_redirect
from tunneld.sites.site import OnVerdict, Request
from tunneld.sites.stream import RequestStream
from tunneld.tunnel.ingress.ingress import Arrivals
from tunneld.tunnel.server_side import Takeover
from tunneld.tunnel.snapshot import IngressSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor

FAILURE_LOG_RATE = Rate.parse("60/m")
"""Log lines about failed requests of one name, as for refused visitors."""
NOT_OPEN = AdmissionRefusal(RefusalKind.UNSERVED, "the tunnel accepts no new visitors")


class HostIngress:
    """A name of one tunnel. Implements `Ingress` and `Site`."""

    def __init__(self, spec: TunnelSpec, name: HostName, names: SharedNames, takeover: Takeover) -> None:
        """Take the name. Raises `LimitReachedError` where another tunnel has it, unless that one is replaced."""
        options = spec.options
        self.keeps_tls = options.tls == "pass"
        self.rewrite = HostRewrite(options.host_header.encode()) if options.host_header else None
        self.tunnel = spec.id
        self.uri = names.uri(name, keeps_tls=self.keeps_tls)
        self._name = name
        self._names = names
        self._owner = spec.owner
        self._plain_http = options.plain_http
        rules = _guard_rules(spec, name)
        self._guard = None if rules.is_empty else SiteGuard(rules, names.guards)
        self._log = structlog.get_logger("tunnel").bind(tunnel=spec.id, host=str(name))
        self._limiter = LogLimiter(FAILURE_LOG_RATE)
        self._arrivals: Arrivals | None = None
        self._nursery: trio.Nursery | None = None
        self._paused = False
        self._held: list[Visitor] = []  # that came before `listen`
        self._streams: set[RequestStream] = set()  # open ones: each keeps a visitor's connection in memory
        self._former: HostIngress | None = None  # of the replaced tunnel
        sites = names.sites
        if name in takeover.addresses and isinstance(former := sites.get(name), HostIngress):
            self._former = former
            sites.replace(name, self)
        else:
            sites.add(name, self)
        whole = sites.get(HostName(name.name))  # for a path: the site of the other ones, which may keep the TLS of all
        self._needs_certificate = whole is None or not whole.keeps_tls
        if self._needs_certificate:
            names.on_taken(name, self._owner)

    # Ingress

    @property
    def address(self) -> Address:
        """The host name."""
        return self._name

    @property
    def listeners(self) -> Sequence[socket.socket]:
        """See `Ingress.listeners`: it has none of its own."""
        return ()

    def listen(self, _engine: Engine, arrivals: Arrivals, nursery: trio.Nursery, _failed: FailureCallback) -> None:
        """See `Ingress.listen`."""
        self._arrivals, self._former, self._nursery = arrivals, None, nursery
        if self._guard is not None:
            self._guard.start(nursery)
        held, self._held = self._held, []
        for visitor in held:
            self._take(visitor)

    def pause(self) -> None:
        """See `Ingress.pause`."""
        self._paused = True

    def leave_idle(self) -> None:
        """See `Ingress.leave_idle`. Requests under way are completed first."""
        for stream in list(self._streams):
            stream.retire()

    def change(self, spec: TunnelSpec) -> None:
        """See `Ingress.change`."""
        rules = _guard_rules(spec, self._name)
        if self._guard is not None:
            self._guard.change_networks(rules.networks)
        elif not rules.is_empty:
            self._guard = SiteGuard(rules, self._names.guards)
            if self._nursery is not None:
                self._guard.start(self._nursery)

    def export(self) -> IngressSnapshot:
        """See `Ingress.export`."""
        self.pause()
        return IngressSnapshot(self._name, None)

    def close(self) -> None:
        """See `Ingress.close`. A tunnel that was never started gives the name back, and what it held."""
        if self._former is not None and self._names.sites.get(self._name) is self:
            self._names.sites.replace(self._name, self._former)
        self._names.sites.remove(self._name, self)
        if self._needs_certificate and (not self._paused or self._arrivals is not None):
            self._names.on_freed(self._name, self._owner)
        self._paused, self._arrivals = True, None
        if self._guard is not None:
            self._guard.stop()
        self.leave_idle()
        held, self._held = self._held, []
        successor = self._names.sites.get(self._name)
        for visitor in held:
            if isinstance(successor, HostIngress):
                successor._take(visitor)
            else:
                visitor.refuse(NOT_OPEN)

    # Site

    def examine(self, request: Request, on_verdict: OnVerdict) -> None:
        """See `Site.examine`: http is redirected to https where the name has a certificate."""
        former = self._former
        if former is not None and not former._paused:
            former.examine(request, on_verdict)
        elif not (request.is_secure or self._plain_http == "allow") and (answer := self._answer_plain_http(request)):
            on_verdict(answer)
        elif self._guard is None:
            on_verdict(None)
        else:
            self._guard.examine(request, on_verdict)

    def _answer_plain_http(self, request: Request) -> bytes | None:
        if self._plain_http == "refuse":
            return refused(request, 403)
        if not (self.keeps_tls or self._names.is_secure(self._name.name)):
            return None
        return https_redirect(request.head, self._names.https_port, request.identity, keep_alive=request.keep_alive)

    def open(self, stream: RequestStream, client: Peer, origin: Origin) -> None:
        """See `Site.open`."""
        stream.listed_in = self._streams
        self._streams.add(stream)
        self._take(Visitor(stream, client, origin.reached, HostName(self._name.name)))

    def open_connection(self, connection: socket.socket, peer: Peer, reached: Peer | None, server_name: str) -> None:
        """See `Site.open_connection`."""
        self._take(Visitor(connection, peer, reached, HostName(server_name)))

    def _take(self, visitor: Visitor) -> None:
        """Pass a visitor to the tunnel, or to the one that it replaces while that one serves."""
        former = self._former
        if former is not None and not former._paused:
            former._take(visitor)
        elif self._paused:
            visitor.refuse(NOT_OPEN)
        elif self._arrivals is None:
            self._held.append(visitor)
        elif not visitor.has_left:
            self._arrivals.arrive(visitor)

    def on_failed(self, reason: str) -> None:
        """See `Site.on_failed`."""
        if (left_out := self._limiter.passes(trio.current_time())) is not None:
            self._log.info("request failed", reason=reason, left_out=left_out)


def _guard_rules(spec: TunnelSpec, name: HostName) -> GuardRules:
    """What the options of a tunnel demand of the visitors of its name."""
    options, rules = spec.options, spec.limits.rules
    return GuardRules(
        name,
        spec.credential,
        NetworkRules(rules) if any(rules.allow) or rules.deny else None,
        options.auth,
        options.forward_auth,
        options.forward_auth_fields,
        options.hsts,
    )
