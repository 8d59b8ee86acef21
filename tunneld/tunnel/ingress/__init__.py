"""Where the visitors of a tunnel come from: one file per kind.

ingress       the contract
port          a TCP port of the tunnel's own
host          a host name on the shared HTTP and TLS ports
private       no port at all: control connections that ask for the tunnel by its address
proxy_header  the PROXY protocol header that a trusted proxy sends ahead of a visitor's bytes

An ingress makes a `Visitor` of each client and passes it to the tunnel's `WaitingVisitors`. A UDP port would be another
file, with one visitor per client address.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunneld.net.address import Port
from tunneld.policy.limits import EffectiveLimits
from tunneld.tunnel.ingress.host import HostIngress
from tunneld.tunnel.ingress.ingress import Ingress
from tunneld.tunnel.ingress.port import open_ports
from tunneld.tunnel.ingress.private import PrivateIngress
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
    opened: list[Ingress] = []
    if (address := spec.private) is not None:
        return (PrivateIngress(spec, address, spec.services.privates, takeover),)
    try:
        for name in spec.names:
            assert spec.services.names is not None
            opened.append(HostIngress(spec, name, spec.services.names, takeover))
        if spec.options.client_port is not None or not spec.names:
            of_port = [one for one in snapshots if isinstance(one.address, Port)]
            opened += open_ports(spec, limits, of_port, takeover)
    except BaseException:
        for one in opened:
            one.close()
        raise
    return tuple(opened)
