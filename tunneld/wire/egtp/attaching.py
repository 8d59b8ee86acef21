"""How a node attaches to its streams: the body of `are there messages v2`, with what we add. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.envelope import ID_SIZE
from tunneld.wire.egtp.fields import as_dictionary, integer_at
from tunneld.wire.mencode import Value

UNKNOWN_ASSOCIATION = "unknown association"
"""The reason why a node cannot go on with its streams: the relay was restarted, or did not wait any longer."""


@dataclass(frozen=True, slots=True)
class AttachRequest:
    """The body of `are there messages v2`, with what we add: which association of the two nodes goes on.

    `association` are 20 octets that the node chose; it is `resumed` if the node has served it before, and has all
    messages before the number `received`. Without fast relay, the node wants what waits in the response, and nothing on
    this connection after that. It polls again within `poll_interval` seconds; 0: while the relay waits for it anyway.
    """

    association: bytes
    resumed: bool = False
    received: int = 0
    fast_relay: bool = True
    poll_interval: int = 0

    def encode(self) -> Value:
        """The body."""
        body: dict[int | bytes, Value] = {
            b"association": self.association,
            b"enable fast relay": int(self.fast_relay),
            b"received": self.received,
            b"response version": 3,
            b"resumed": int(self.resumed),
        }
        if self.poll_interval:
            body[b"poll interval"] = self.poll_interval
        return body

    @classmethod
    def parse(cls, body: Value) -> AttachRequest:
        """Read a body. Raises `RemoteProtocolError`."""
        match body:
            case {
                b"association": bytes(association),
                b"received": int(received),
                b"resumed": int(resumed),
                b"enable fast relay": int(fast_relay),
            } if len(association) == ID_SIZE and received >= 0:
                interval = integer_at(as_dictionary(body, "the body"), b"poll interval", 0, 0)
                return cls(association, bool(resumed), received, bool(fast_relay), interval)
        raise RemoteProtocolError("are there messages: association, received or resumed is missing or invalid")
