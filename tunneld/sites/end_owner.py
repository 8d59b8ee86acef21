"""The part of a visitor's HTTP connection that only concerns its end: how it fails, and what it takes."""

from __future__ import annotations

import structlog

from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import reason_of

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")


class EndOwner:
    """Owns the end of a visitor. A subclass handles what arrives."""

    def __init__(self, end: TlsEnd) -> None:
        self._end = end
        self._is_over = False

    def drop(self, reason: str) -> None:
        """Cut the connection now."""
        if not self._is_over:
            self.on_over(reason)
            self._end.reset(reason)

    def on_over(self, reason: str) -> None:
        """The end is closed, or about to be. It sets `_is_over`."""
        raise NotImplementedError

    # The handler of the end, where it fails

    def on_write_failed(self, error: OSError) -> None:
        """The visitor reads no more."""
        self.drop(reason_of(error))

    def on_reset(self, error: OSError) -> None:
        """The visitor is gone."""
        self.drop(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug in here."""
        log.error("http connection failed: internal error", exc_info=error)
        self.drop("internal error")
