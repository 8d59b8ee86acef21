"""The multiplexed carrier: many byte streams over one connection, served inside the pump.

    link       the connection below: a plain socket or one in TLS, read and written without waiting
    carrier    one link and its codec: channels by session id; what it tells whom is in owner
    outbox     what was said and not written yet: the one place that writes
    heartbeat  is the peer alive?
    channel    one byte stream: what was received and not taken yet, and how much may be sent
    duct       what a channel has in common with a connection in TLS that carries one visitor (tls)
    joint      a duct joined to a kernel socket: the relay of a visitor, without a task
    stream     a duct as a Trio stream, for everything else
    window     how much a channel may receive before it must be heard from (pure)

(WebMUX calls a channel a session; that word stays inside its codec.)
"""

from tunneld.session.carrier import Carrier
from tunneld.session.channel import Channel
from tunneld.session.duct import End
from tunneld.session.limits import CarrierLimits
from tunneld.session.link import Connection, connection_over
from tunneld.session.owner import CarrierEvents
from tunneld.session.stream import EndStream
from tunneld.session.tls import TlsEnd

__all__ = [
    "Carrier",
    "CarrierEvents",
    "CarrierLimits",
    "Channel",
    "Connection",
    "End",
    "EndStream",
    "TlsEnd",
    "connection_over",
]
