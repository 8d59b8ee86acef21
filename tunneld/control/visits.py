"""The verb `visitTunnel`: a control connection becomes a visitor of a private tunnel.

request ──► may this credential ask, is the tunnel open ──► the connection leaves the control port, unanswered
        ──► limits of the tunnel, a connection to the agent ──► OK, and from then on bytes of the two ends
"""

from __future__ import annotations

import socket
import sys
from functools import partial

from tunneld.control.verbs import DaemonControl
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.engine.engine import Engine
from tunneld.errors import NoSuchTunnelError, UsageError
from tunneld.net.address import parse_private
from tunneld.policy.private import check_visit
from tunneld.tls.connection import TlsSocket
from tunneld.tunnel.ingress.private import VisitAnswers
from tunneld.tunnel.private_tunnels import PrivateDoor
from tunneld.tunnel.visitor import Visitor, VisitorEnd
from tunneld.wire.lines import ControlRequest

HAS_TLS_ENDS = sys.platform == "linux"
"""Whether this system has epoll, which relays TLS connections without a task for each."""


async def visit_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Make this control connection a visitor of a private tunnel. The answer is sent once it has a connection to the
    agent, or when it is refused.
    """
    address = parse_private(request.args[0])
    check_visit(caller.known_grant, address)
    if not caller.can_hand_over:
        raise UsageError("visitTunnel belongs to the control port: its connection becomes that to the tunnel")
    door = daemon.service.find_private(address)
    if door is None:
        raise NoSuchTunnelError(
            f"no private tunnel {address} is open: check the name and the id; its agent must run and use this relay"
        )
    return Reply(take=partial(_take_visitor, daemon.service.engine, door, caller))


def _take_visitor(
    engine: Engine, door: PrivateDoor, caller: Requester, connection: socket.socket | TlsSocket, early: bytes
) -> None:
    """Pass a control connection to a private tunnel, as one of its visitors."""
    if isinstance(connection, TlsSocket):
        end = _tls_end(engine, connection, early)
        early = b""
    else:
        end = connection
    if end is not None:
        peer, reached, credential = (caller.host, caller.port), (caller.local_host, 0), caller.known_grant.name
        door.take(Visitor(end, peer, reached, credential=credential, early=early, answers=VisitAnswers(door.address)))


def _tls_end(engine: Engine, connection: TlsSocket, received: bytes) -> VisitorEnd | None:
    """The end for a TLS connection; None where it is broken, and closed."""
    if not HAS_TLS_ENDS:
        connection.close()
        return None
    from tunneld.engine.pump import Pump  # noqa: PLC0415  # Linux only
    from tunneld.engine.tls_end import TlsEnd  # noqa: PLC0415

    assert isinstance(engine, Pump)
    end = TlsEnd(engine, connection)
    end.unread(received)
    try:
        end.start()
    except OSError:
        connection.close()
        return None
    return end
