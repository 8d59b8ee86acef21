"""One exposure: make a local server reachable, serve its visitors, and reconnect after a loss.

    expose
    ├─ visitors                  without tasks, see visitors.py. They outlive tunnels: when the relay drains, the
    │                            visitors that it has already connected may finish
    ├─ slow dial ×N              only for visitors for whom the local server cannot be dialled without waiting
    ├─ source ×N                 of the open tunnel, and of former ones until their visitors finish: with webmux its
    │                            part of the process's carriers, see carriers.py
    ├─ health checks             where they are configured: see health.py
    └─ (this task)               connected ──► open, or find the tunnel still open ──► keep ──► lost ──► wait ─┐
                                    └─────────────────────────────────────────────────────────────────────────┘

The engine and the control connection (relay_connection.py) are not part of it and may serve other exposures. When an
exposure ends, it removes what it has in the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from tunneld.agent.backoff import Backoff
from tunneld.agent.config import ExposureConfig, local_host
from tunneld.agent.events import Activity, Field, Reporter, Stats
from tunneld.agent.health import Check, UnhealthyPolicy, run_checks
from tunneld.agent.host_check import report_plain_http, report_refused_host
from tunneld.agent.local import ListeningSockets, LocalServer, why_nothing_listens
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.relay_connection import PERMANENT_REFUSALS, RelayConnection
from tunneld.agent.request import TunnelRequest
from tunneld.agent.session import AgentContext, TunnelSession, keep_resting
from tunneld.agent.shutdown import AgentShutdown
from tunneld.agent.visitors import LocalVisitors
from tunneld.client import Client
from tunneld.engine.engine import Engine
from tunneld.errors import (
    ExpiredError,
    LimitReachedError,
    ListenError,
    NoSuchTunnelError,
    NotAllowedError,
    RefusedError,
    TunneldError,
    UsageError,
)
from tunneld.net.address import format_ports
from tunneld.net.endpoint import Target

if TYPE_CHECKING:
    from tunneld.agent.https import TlsVisitors
    from tunneld.agent.inspection import Inspection, Inspectors
    from tunneld.agent.private import PrivateVisitors

PORT_REFUSALS = frozenset({LimitReachedError.code, ListenError.code, UsageError.code})
"""Codes with which a relay refuses a port that is taken, or that a reload removed from its range."""

EXPIRY_TOLERANCE = 1.0
"""Seconds by which a tunnel may expire at the relay before it does by the agent's clock."""


@asynccontextmanager
async def open_exposure(
    config: ExposureConfig,
    relay: RelayConnection,
    reporter: Reporter,
    engine: Engine,
    monitor: NetworkMonitor,
    *,
    on_withdrawn: Callable[[], None] = lambda: None,
    sockets: ListeningSockets | None = None,
    inspectors: Inspectors | None = None,
) -> AsyncIterator[Exposure]:
    """Yield an exposure, to be run in the block. After the block its tunnel is closed and its visitors are dropped.

    The caller runs the `relay` connection, the `engine`, which moves the bytes, and the `monitor`, which ends delays
    early. `on_withdrawn` is called once the relay sends no more visitors, while the present ones finish.
    Exposures that start together share `sockets`, by which they find out whether their local servers listen, and
    `inspectors`.
    """
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())

        def on_lost(reason: str, delay: float) -> None:
            exposure.on_connection_lost(reason, delay)

        stack.enter_context(relay.attached(on_lost))  # first: the connection ends with the last that was attached
        local, inspection = LocalServer(config.target), None
        if config.inspect is not None:
            from tunneld.agent.inspection import Inspectors, open_inspection  # noqa: PLC0415 - h11, for the few

            inspectors = inspectors or Inspectors(nursery)
            inspection = stack.enter_context(open_inspection(config, local, reporter, inspectors))
        exposure = Exposure(
            config, relay, reporter, engine, nursery, monitor, local, inspection, on_withdrawn=on_withdrawn
        )
        if (check := config.check) is not None:
            on_result = partial(exposure.on_health, check)
            nursery.start_soon(run_checks, LocalServer(config.target), check, reporter, on_result)
        if config.request.options.get("host") and not config.request.options.keys() & {"host_header", "tls"}:
            nursery.start_soon(exposure.check_host, config.target)
        reasons = [why_nothing_listens(target, sockets) for target in config.target.each]
        if all(reasons) and (reason := reasons[0]) is not None:
            reporter.report("trouble", reason=reason, repeated=0)
        elif config.scheme == "https" and config.https is None and not config.request.options.get("host"):
            nursery.start_soon(report_plain_http, LocalServer(config.target), reporter)
        try:
            yield exposure
        finally:
            await exposure.close()
            nursery.cancel_scope.cancel()


class Exposure:
    """A local server that is reachable through a relay. Made by `open_exposure`."""

    def __init__(
        self,
        config: ExposureConfig,
        relay: RelayConnection,
        reporter: Reporter,
        engine: Engine,
        nursery: trio.Nursery,
        monitor: NetworkMonitor,
        local: LocalServer,
        inspection: Inspection | None,
        *,
        on_withdrawn: Callable[[], None],
    ) -> None:
        """`nursery` runs the tasks of visitors and carriers. For the rest see `open_exposure`."""
        self.session: TunnelSession | None = None
        """Of the open tunnel, or of the one that was open last."""
        self._relay = relay
        self._request = config.request
        self._reporter = reporter
        self._monitor = monitor
        self._visitors = LocalVisitors(
            engine,
            [local] if config.target.count == 1 else [LocalServer(target) for target in config.target.each],
            nursery,
            reporter,
            linger=config.linger,
            http=config.scheme == "http" or config.https is not None,
            on_left=self._on_visitor_left,
            new_tap=inspection.new_tap if inspection else None,
        )
        shared = bool(config.request.options.get("share"))
        self._tls: TlsVisitors | None = None  # where TLS ends here
        if config.https is not None:
            from tunneld.agent.https import end_tls  # noqa: PLC0415 - for the few that need it

            take, fail = self._visitors.take, self._visitors.count_failure
            self._tls = end_tls(engine, config.https, reporter, take, fail, proxy_header=config.proxy_header)
            nursery.start_soon(self._tls.certificates.run)
        self._private: PrivateVisitors | None = None
        if config.private is not None:
            from tunneld.agent.private import PrivateVisitors  # noqa: PLC0415 - as above

            take, fail = self._visitors.take, self._visitors.count_failure
            self._private = PrivateVisitors(
                engine, config.private, reporter, take, fail, proxy_header=config.proxy_header
            )
            login = relay.access.credential
            self._request = config.request.with_options(private=self._private.claim(login[0] if login else ""))
        self._shutdown = AgentShutdown(relay, self._visitors, reporter, on_withdrawn, shared=shared)
        self._context = AgentContext(engine, nursery, relay.access, reporter, partial(relay.carriers, engine))
        self._withdrawn = False  # no connections at the relay, because the local server is unhealthy
        self._opened_at: float | None = None  # when the tunnel was opened or found, in `trio.current_time`
        self._expires_at: float | None = None  # the end of the first tunnel's ttl, in `trio.current_time`
        self._was_open = False
        self._serving = False
        self._bug: Exception | None = None
        self._run_scope = trio.CancelScope()
        self._serve_scope = trio.CancelScope()  # cancelled by `drain`

    @property
    def stats(self) -> Stats:
        """Counts of this exposure, up to now."""
        up, down = self._visitors.bytes_moved
        parked = self.session.source.parked if self.session else 0
        return Stats(self._visitors.now, self._visitors.served, self._visitors.failed, parked, up, down)

    @property
    def activity(self) -> Activity:
        """The same and more, for a view of this exposure."""
        client = self.session.client if self.session else None
        return Activity(self.stats, self._visitors.latest, client.latency if client else None)

    async def run(self) -> None:
        """Keep the local server reachable until the tunnel expires (`ttl`, `idle_timeout`) or `stop` or `drain`.

        Raises the error of the first attempt unless `patient`, and later only a `RefusedError` that is permanent. All
        other errors are reported, and retried after a delay.
        """
        with self._run_scope:
            with self._serve_scope, self._monitor.calling(self._on_network_change):
                try:
                    self._serving = True
                    await self._serve_forever()
                finally:
                    self._serving = False
            if self._shutdown.drain_timeout is not None:
                if self._private is not None:
                    self._private.retire()
                await self._shutdown.drain(self.session)
        if self._bug:
            raise self._bug

    def on_health(self, check: Check, healthy: bool) -> None:
        """Called by the health checks after each one: act on the result. Harmless when repeated."""
        if check.policy is UnhealthyPolicy.TELL or self._shutdown.drain_timeout is not None:
            return
        if check.policy is UnhealthyPolicy.WITHDRAW:  # visitors already on their way to this agent are still served
            if self.session is not None and healthy is self._withdrawn:
                (self.session.resume if healthy else self.session.withdraw)()
            self._withdrawn = not healthy
        elif healthy:
            self._visitors.accept()
        else:
            self._visitors.turn_away("the local server is unhealthy", answer_http=check.kind == "http")

    async def check_host(self, target: Target) -> None:
        """Report if the local server refuses requests for its public name, once the first visitor has come."""
        await self._visitors.first.wait()
        if self.session is not None:
            public = self.session.tunnel.client.web_authority
            await report_refused_host(LocalServer(target), public, local_host(target), self._reporter)

    def stop(self, reason: str) -> None:
        """End `run` now; `reason` is reported."""
        self._shutdown.reason = reason
        self._run_scope.cancel()

    def drain(self, reason: str, timeout: float) -> None:
        """Take no new visitors, and end `run` when the present ones have finished or after `timeout` seconds. Harmless
        when repeated.
        """
        if self._shutdown.drain_timeout is None:
            self._shutdown.reason, self._shutdown.drain_timeout = reason, timeout
            self._serve_scope.cancel()

    def fail(self, error: Exception) -> None:
        """Called after a bug in a callback: end `run` with that error."""
        self._bug = self._bug or error
        self._run_scope.cancel()

    async def close(self) -> None:
        """Close the tunnel at the relay, in bounded time, and report it. Finishes even if cancelled."""
        session, self.session = self.session, None
        if session is not None:
            await self._shutdown.close(session)
        if self._private is not None:
            self._private.close()

    def retry_now(self) -> None:
        """End the delay before the next attempt."""
        self._monitor.wake()

    def _on_visitor_left(self) -> None:
        if self.session is not None:
            self.session.on_visitor_left()

    def _on_network_change(self) -> None:
        if self.session is not None:
            self.session.source.probe()

    async def _serve_forever(self) -> None:
        """Open the tunnel, keep it, and after a loss do both again. Raises what is permanent."""
        backoff = Backoff()
        while True:
            self._opened_at = None
            try:
                client = await self._relay.client()
                session = await self._find_or_open(client)
                if not self._withdrawn:
                    session.resume()
                self._opened_at = trio.current_time()
                await (keep_resting(session, client, self._relay) if self._request.poll else session.keep(client))
            except TunneldError as error:
                self._visitors.explain_cuts(str(error))
                if self._is_expired(error):
                    return
                if self._is_permanent(error):
                    self._shutdown.reason = str(error)
                    await self._shutdown.wait_for_visitors(self.session)
                    raise
                if not client.answering or self._is_revoked(error):
                    self._relay.drop(client, error)
                    continue
                opened_at = self._opened_at
                delay = backoff.delay_after(0.0 if opened_at is None else trio.current_time() - opened_at)
                self._report_loss(str(error), delay)
                if await self._monitor.sleep(delay):
                    backoff.reset()

    def on_connection_lost(self, reason: str, delay: float) -> None:
        """Called by the relay connection: there is none, and the next attempt is made after `delay` seconds."""
        if self._serving:
            self._report_loss(reason, delay)
            if self._has_outlived_ttl:
                self.stop(self._ttl_reason)
        if self.session is not None:
            self.session.wake()

    def _report_loss(self, reason: str, delay: float) -> None:
        self._reporter.report("reconnecting", reason=reason, delay=round(delay, 1))

    def _is_revoked(self, error: TunneldError) -> bool:
        """Whether the credential was changed while the tunnel was open: the next login shows what that means."""
        return isinstance(error, RefusedError) and error.reply_code == NotAllowedError.code

    def _is_expired(self, error: TunneldError) -> bool:
        """Whether the tunnel has ended by its `ttl` or `idle_timeout`, as the user asked, not by accident."""
        options = self._request.options
        if self._has_outlived_ttl:
            self._shutdown.reason = self._ttl_reason
            return True
        if not (isinstance(error, RefusedError) and error.reply_code == ExpiredError.code):
            return False
        self._shutdown.reason = str(error)
        return any(key in options and str(error).endswith(f"({key})") for key in ("ttl", "idle_timeout"))

    @property
    def _has_outlived_ttl(self) -> bool:
        return self._expires_at is not None and trio.current_time() + EXPIRY_TOLERANCE >= self._expires_at

    @property
    def _ttl_reason(self) -> str:
        return f"lifetime of {self._request.options['ttl']} s is over (ttl)"

    def _is_permanent(self, error: TunneldError) -> bool:
        code = error.reply_code if isinstance(error, RefusedError) else error.code
        if code == NotAllowedError.code and self._opened_at is not None:
            return False
        return code in PERMANENT_REFUSALS or not (self._was_open or self._relay.patient)

    async def _find_or_open(self, client: Client) -> TunnelSession:
        """Return the session of the tunnel if only the control connection was lost, else open a new tunnel."""
        session = self.session
        if session is not None:
            try:
                await session.check(client)
                await session.rejoin(client)
            except NoSuchTunnelError:
                self._relay.leave(session.tunnel.id)
                session.source.close()
            else:
                self._reporter.report("resumed", address=str(session.tunnel.client), id=session.tunnel.id)
                return session
        self.session = session = await self._open(client, session)
        self._was_open = True
        tunnel = session.tunnel
        self._visitors.public_ports = tunnel.ports
        self._relay.serve(tunnel.id)
        if self._tls is not None:
            self._tls.certificates.want(tunnel.client.host)
        several: dict[str, Field] = {"ports": format_ports(tunnel.ports)} if tunnel.ports else {}
        self._reporter.report("opened", address=str(tunnel.client), uri=str(tunnel.server), id=tunnel.id, **several)
        return session

    async def _open(self, client: Client, former: TunnelSession | None) -> TunnelSession:
        """Open a tunnel; after a loss at the former address, which visitors know, if that is free."""
        request = self._request
        if former is None:
            session = await self._start_session(client, request)
            ttl = request.options.get("ttl")
            self._expires_at = None if ttl is None else trio.current_time() + float(ttl)
            return session
        if request.options.get("name"):  # do not replace another agent that took the name over, or both would in turn
            request = request.with_options(replace=False)
        if self._expires_at is not None:
            request = request.with_options(ttl=round(self._expires_at - trio.current_time(), 3))
        try:
            return await self._start_session(client, request.at_address(former.tunnel.client))
        except RefusedError as error:
            is_name = "host" in request.options and error.reply_code == NotAllowedError.code  # it was a random one
            if not (is_name or error.reply_code in PORT_REFUSALS) or "client_port" in request.options:
                raise
        return await self._start_session(client, request)

    async def _start_session(self, client: Client, request: TunnelRequest) -> TunnelSession:
        """Open a tunnel whose visitors reach the local server. Raises as `TunnelSession.start`."""
        take = (self._private or self._tls or self._visitors).take
        return await TunnelSession.start(client, self._context, request, on_visitor=take, on_failure=self.fail)
