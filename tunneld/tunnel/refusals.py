"""Who was turned away from one tunnel: counted, told to whoever watches, and logged as far as a flood lets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import structlog
import trio

from tunneld.endpoint import format_peer
from tunneld.events import Events
from tunneld.rules.admission import AdmissionRefusal, RefusalKind
from tunneld.rules.rates import LogLimiter, Rate

REFUSALS_LOGGED = Rate.parse("60/m")
"""Lines about refused connections of one tunnel: as many at once show what goes on, one a second that it still does."""


class RefusalLog:
    """Those of one tunnel, on either side."""

    def __init__(self, tunnel: str, events: Events, before: Mapping[str, int]) -> None:
        """`tunnel` is its id; `before` is what another process has counted of it, by the names of `RefusalKind`."""
        self.visitors = Counter({RefusalKind(kind): count for kind, count in before.items()})
        self._tunnel = tunnel
        self._events = events
        self._log = structlog.get_logger("tunnel").bind(tunnel=tunnel)
        self._thinning = LogLimiter(REFUSALS_LOGGED)

    def visitor(self, peer: Any, refusal: AdmissionRefusal) -> None:
        """A visitor was closed."""
        self.visitors[refusal.kind] += 1
        self._tell("client", peer, refusal.reason)

    def server(self, peer: Any, reason: str) -> None:
        """Somebody who connected as the hidden server was closed."""
        self._tell("server", peer, reason)

    def _tell(self, side: str, peer: Any, reason: str) -> None:
        if self._events.watched:
            self._events.publish("refused", id=self._tunnel, side=side, reason=reason, **{"from": format_peer(peer)})
        if (left_out := self._thinning.passes(trio.current_time())) is not None:
            self._log.info("connection refused", side=side, peer=format_peer(peer), reason=reason, left_out=left_out)
