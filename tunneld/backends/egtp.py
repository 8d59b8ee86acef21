"""The EGTP backend: the hidden server's node has one connection, on which every visitor is a stream in messages.

    KeyRegistry                  which server side has which node id
    └─ EgtpServerSide ×tunnel    egtp://HOST:PORT/NODE-ID; a visitor goes to its least loaded association
       └─ EgtpCarrier ×N         an association with a node; see tunneld/egtp/

Each tunnel is a node of its own, whose key is derived from the relay's and from its name, so that the server URI is the
same when it is opened again. Its id is the key of the server URI: a hidden server that knows the URI cannot be made to
talk to anything else. The hidden server proves that it has the key whose id was given to openTunnel (`node`). So
nothing in the URI is a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import ClassVar

from tunneld.backends.mux_side import MuxServerSide, VisitorCarrier
from tunneld.egtp.carrier import EgtpCarrier
from tunneld.errors import UsageError
from tunneld.net.node_id import NodeId
from tunneld.policy.options import TunnelOptions
from tunneld.tls.identity import Identity
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.server_side import BackendServices, ServerSideSnapshot, TunnelContext

SALT_BYTES = 16
"""Random bytes from which the key of a tunnel without a name is derived, with the relay's key."""


class EgtpServerSide(MuxServerSide):
    """The associations of one tunnel, at `egtp://HOST:PORT/NODE-ID`."""

    backend: ClassVar[str] = "egtp"

    def __init__(self, context: TunnelContext) -> None:
        """Derive a key."""
        relay = context.services.identity()
        if relay is None:
            raise UsageError("this relay has no egtp backend")
        self._salt = context.snapshot.key if context.snapshot is not None else context.holder
        self._salt = self._salt or secrets.token_hex(SALT_BYTES)
        self.identity = derive(relay, self._salt)
        self.associations: dict[bytes, EgtpCarrier] = {}  # by the node's id and the one that the node gave
        self._nodes = {context.node}
        super().__init__(context)

    @classmethod
    def check(cls, services: BackendServices, options: TunnelOptions) -> None:
        """See `Backend.check`."""
        cls._port(services).check(cls.backend)
        if not options.node:
            raise UsageError("the backend egtp requires node=ID, the id of the node that serves the tunnel")

    def admit_agent(self, options: TunnelOptions) -> None:
        """See `ServerSide.admit_agent`."""
        if options.node:
            self._nodes.add(options.node)

    @property
    def is_open(self) -> bool:
        """Whether further associations may begin."""
        return not self._closed

    def is_admitted(self, node: NodeId) -> bool:
        """Whether this node may serve the tunnel."""
        return str(node) in self._nodes

    def on_carrier_closed(self, carrier: VisitorCarrier) -> None:
        """See `MuxServerSide.on_carrier_closed`."""
        super().on_carrier_closed(carrier)
        for key, other in list(self.associations.items()):
            if other is carrier:
                del self.associations[key]
        if not self.associations:
            self._registry.forget(self)

    def close(self) -> None:
        """See `ServerSide.close`. Nodes with visitors find their associations until these have left."""
        super().close()
        if self.associations:
            self._registry.keep(self)

    def export(self) -> ServerSideSnapshot:
        """See `ServerSide.export`. The next process derives the same key."""
        super().export()
        return ServerSideSnapshot(key=self._salt, scheme=self.backend)

    def _choose_key(self) -> str:
        """The id of the tunnel's node."""
        return str(self.identity.id)


def derive(relay: Identity, salt: str) -> Identity:
    """The key of one tunnel: it depends on the relay's private key, and tells nothing about it."""
    return Identity.from_seed(hmac.digest(relay.pem, f"tunneld egtp tunnel {salt}".encode(), hashlib.sha256))


def find_identity(registry: KeyRegistry, recipient: bytes) -> Identity | None:
    """The key of the tunnel with this node id, if there is one."""
    sides = find_sides(registry, NodeId(recipient))
    return sides[0].identity if sides else None


def find_sides(registry: KeyRegistry, node: NodeId) -> list[EgtpServerSide]:
    """The server sides with this node id: those that drain, and last that of the open tunnel, if there is one."""
    return [side for side in registry.find_all(str(node)) if isinstance(side, EgtpServerSide)]
