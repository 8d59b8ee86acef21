"""Where the visitors of a tunnel come from: one file per kind.

ingress       the contract
port          a TCP port of the tunnel's own
proxy_header  the PROXY protocol header that a trusted proxy sends ahead of a visitor's bytes

An ingress makes a `Visitor` of each client and passes it to the tunnel's `WaitingVisitors`. A host name on a shared
port would be another file: `open_ingresses` enters the ingress in the shared port's table of names, its `close` removes
it, and the shared port calls its `arrive` with each visitor and the bytes already read from it. A UDP port likewise,
with one visitor per client address.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunneld.policy.limits import EffectiveLimits
from tunneld.tunnel.ingress.ingress import Ingress
from tunneld.tunnel.ingress.port import PortIngress
from tunneld.tunnel.server_side import NO_TAKEOVER, Takeover
from tunneld.tunnel.snapshot import IngressSnapshot
from tunneld.tunnel.spec import TunnelSpec


def open_ingresses(
    spec: TunnelSpec,
    limits: EffectiveLimits,
    snapshots: Sequence[IngressSnapshot] = (),
    takeover: Takeover = NO_TAKEOVER,
) -> tuple[Ingress, ...]:
    """Open the ingresses of a new tunnel, the first one being the one to advertise; or continue from the `snapshots` of
    another process. An ingress at an address of the `takeover` shares it with the tunnel that is replaced, which serves
    until the new one is started.

    Raises `ListenError`, `LimitReachedError`, `ShortageError` or `UsageError`, and leaves nothing open then.
    """
    return (PortIngress(spec, limits, snapshots[0] if snapshots else None, takeover),)
