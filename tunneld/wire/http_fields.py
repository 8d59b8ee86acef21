"""Field names of HTTP with a special meaning. Apart from http1.py, because agents do without its parser, httptools."""

from __future__ import annotations

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade", b"http2-settings")
)
"""Fields that are never passed on as they came (RFC 9110 §7.6.1). `Trailer` describes the message and is passed on."""

KEPT_FIELDS = frozenset(
    (b"host", b"content-length", b"content-type", b"trailer", b"expect", b"cookie", b"authorization")
)
"""Fields that are passed on even if Connection names them: without them the next hop would read another message."""
