"""The part of a visitor's HTTP connection that only concerns its end: how it fails, and what is logged of it."""

from __future__ import annotations

import structlog

from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import reason_of
from tunneld.sites.access_log import AccessLog, AccessRecord

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")


class EndOwner:
    """Owns the end of a visitor. A subclass handles what arrives."""

    def __init__(self, end: TlsEnd, access_log: AccessLog | None) -> None:
        """Without `access_log` requests are not logged."""
        self._end = end
        self._is_over = False
        self._access_log = access_log
        self._record: AccessRecord | None = None  # of the request under way

    def start_end(self) -> bool:
        """Start the end, which has its handler. Returns whether it is not broken."""
        try:
            self._end.start()
        except OSError as error:
            self.drop(reason_of(error))
            return False
        return True

    def on_response_spliced(self, count: int) -> None:
        """See `ResponseReceiver.on_response_spliced`."""
        if self._record is not None:
            self._record.down += count

    def end_record(self) -> None:
        """The request under way is over, for the access log."""
        if self._record is not None and self._access_log is not None:
            self._access_log.end(self._record)
            self._record = None

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
