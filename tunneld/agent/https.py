"""End-to-end HTTPS: the visitors' TLS ends in the agent, which obtains the certificate itself.

    take ──► ClientHello ──► challenge of the authority: answered
                         ──► certificate: handshake ──► on_visitor, decrypted
                         ──► not obtained yet: the alert unrecognized_name

The relay passes these connections through and sees only the name; the private key stays in the agent's state folder.

    run                      orders and renews the certificate, see acme/manager.py
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from tunneld.acme.manager import CertificateManager
from tunneld.acme.state import CERTIFICATES, account_folder
from tunneld.agent.events import Reporter
from tunneld.agent.source import VisitorCallback, VisitorConnection
from tunneld.agent.tls_visitor import TlsVisitor, buffered_end
from tunneld.config.certificates import AcmeSettings
from tunneld.config.places import state_folder
from tunneld.engine.end import NO_HANDLER, BufferedEnd
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.errors import UsageError, reason_of
from tunneld.tls.store import CertificateStore
from tunneld.wire.client_hello import UNRECOGNIZED_NAME, HelloError, encode_alert, parse_client_hello

CHALLENGE_PROTOCOL = b"acme-tls/1"
AGENT_FOLDER = "agent"
"""In the state folder: the relay's own certificates, on the same machine, are beside it."""
HANDSHAKE_TIMEOUT = 10.0
"""Seconds for a visitor's handshake, as at the relay (names.head_timeout)."""
NOT_YET = "its certificate is not yet available"


class OwnCertificates:
    """The certificates of one exposure: obtained, kept in the state folder, renewed."""

    def __init__(self, settings: AcmeSettings, reporter: Reporter) -> None:
        """Read the certificates of earlier runs. Raises `UsageError` where there is no state folder."""
        state = state_folder()
        if state is None:
            raise UsageError("no folder for the certificate: set $XDG_STATE_HOME or $HOME")
        state /= AGENT_FOLDER
        self.folder: Path = account_folder(state, settings.directory) / CERTIFICATES
        self._settings = settings
        self._reporter = reporter
        self._store = CertificateStore(self.folder)
        self._store.apply(self._store.load({}))
        self._manager = CertificateManager(self._store, lambda: settings, state, challenges=lambda: ("tls-alpn-01",))
        self._manager.on_failed = self._on_failed
        self._manager.on_stored = self._on_stored
        self._name = ""  # wanted

    async def run(self) -> None:
        """Order and renew, until cancelled."""
        await self._manager.run()

    def want(self, name: str) -> None:
        """The tunnel has this host name from now on. Harmless when repeated."""
        if name != self._name:
            if self._name:
                self._manager.unwant(self._name)
            self._name = name
            self._manager.want(name, "")
            if reason := self._manager.failure(name):  # of an earlier run: it is tried again when its delay is over
                self._on_failed(name, reason)

    def context_for(self, name: str, protocols: tuple[bytes, ...]) -> ssl.SSLContext | None:
        """The context for a handshake in which the client asked for these."""
        if CHALLENGE_PROTOCOL in protocols:
            return self._manager.tls_context(name)
        return self._store.context_for(name)

    def _on_failed(self, name: str, reason: str) -> None:
        self._reporter.report("uncertified", host=name, reason=reason)

    def _on_stored(self, name: str) -> None:
        self._reporter.report("certified", host=name)


class TlsVisitors:
    """Ends the TLS of an exposure's visitors."""

    def __init__(
        self,
        engine: Engine,
        certificates: OwnCertificates,
        on_visitor: VisitorCallback,
        on_failed: Callable[[bytes, str], None],
        *,
        proxy_header: bool,
    ) -> None:
        """`on_visitor` gets each visitor, decrypted, after its handshake; `on_failed` the PROXY header and the reason
        where there is none. `proxy_header`: put the visitor's PROXY header in front of its bytes.
        """
        if not isinstance(engine, Pump):
            raise UsageError("TLS cannot end in this agent: this system has no epoll; leave https_here out")
        self.engine = engine
        self.certificates = certificates
        self.on_visitor = on_visitor
        self.on_failed = on_failed
        self.proxy_header = proxy_header

    def take(self, visitor: VisitorConnection, header: bytes) -> None:
        """Begin a visitor's handshake; never blocks. Owns `visitor` from now on."""
        try:
            end = buffered_end(self.engine, visitor)
        except OSError as error:
            self.on_failed(header, reason_of(error))
        else:
            _HelloAwaited(self, end, header).start()


def end_tls(
    engine: Engine,
    settings: AcmeSettings,
    reporter: Reporter,
    on_visitor: VisitorCallback,
    on_failed: Callable[[bytes, str], None],
    *,
    proxy_header: bool,
) -> TlsVisitors:
    """What ends the TLS of one exposure, with its certificates; see `TlsVisitors`. Raises `UsageError`."""
    return TlsVisitors(engine, OwnCertificates(settings, reporter), on_visitor, on_failed, proxy_header=proxy_header)


class _HelloAwaited:
    """One visitor, until its handshake is done. The handler of its end until the ClientHello is complete."""

    __slots__ = ("_end", "_header", "_owner", "_received", "deadline")

    def __init__(self, owner: TlsVisitors, end: BufferedEnd, header: bytes) -> None:
        self._owner = owner
        self._end = end
        self._header = header
        self._received = b""
        self.deadline = owner.engine.now() + HANDSHAKE_TIMEOUT

    def start(self) -> None:
        """Wait for the ClientHello, which may be there already."""
        self._owner.engine.timers.watch(self)
        self._end.handler = self
        self._end.deliver_buffered()

    # The handler of the end

    def on_data(self, data: memoryview) -> int:
        """Take bytes until the ClientHello is complete."""
        self._received += data
        try:
            hello = parse_client_hello(self._received)
        except HelloError as error:
            self._refuse(error.alert, str(error))
            return len(data)
        if hello is None:
            return len(data)
        context = self._owner.certificates.context_for(hello.server_name, hello.protocols)
        if context is None:
            self._refuse(UNRECOGNIZED_NAME, f"{hello.server_name or 'no name'}: {NOT_YET}")
        else:
            self._owner.engine.timers.forget(self)
            is_challenge = CHALLENGE_PROTOCOL in hello.protocols
            tls = TlsOverEnd(self._end, context, self._on_challenged if is_challenge else self._on_done)
            tls.start(self._received, HANDSHAKE_TIMEOUT)
        return len(data)

    def on_eof(self) -> None:
        """The visitor ended first."""
        self._fail("the visitor left before the TLS handshake")

    def on_writable(self) -> None:
        """Nothing waits to be sent."""

    def on_write_failed(self, error: OSError) -> None:
        """The visitor takes no answer."""
        self._fail(reason_of(error))

    def on_reset(self, error: OSError) -> None:
        """The visitor is gone."""
        self._fail(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug. The end has been reset."""
        self._fail(f"internal error: {error!r}")

    def on_deadline(self) -> None:
        """The visitor is late."""
        self._fail(f"no TLS handshake within {HANDSHAKE_TIMEOUT:g} s")

    # Internal

    def _on_done(self, tls: TlsOverEnd, error: OSError | None) -> None:
        if error is not None:
            self._owner.on_failed(self._header, f"TLS handshake failed: {reason_of(error)}")
            return
        if self._owner.proxy_header:
            tls.unread(self._header)
        self._owner.on_visitor(TlsVisitor(tls), self._header)

    def _on_challenged(self, tls: TlsOverEnd, error: OSError | None) -> None:
        """The authority has seen the answer, and asks nothing."""
        if error is None:
            tls.release()

    def _refuse(self, alert: int, reason: str) -> None:
        """Tell the visitor why, and close."""
        self._owner.engine.timers.forget(self)
        end = self._end
        end.handler = NO_HANDLER
        try:
            end.send(encode_alert(alert))
            end.release()
        except OSError:
            end.reset("not served")
        self._owner.on_failed(self._header, reason)

    def _fail(self, reason: str) -> None:
        self._owner.engine.timers.forget(self)
        self._end.reset("not served")
        self._owner.on_failed(self._header, reason)
