"""The verb `visitTunnel`: a control connection becomes a visitor of a private tunnel.

request ──► may this credential ask, is the tunnel open ──► the connection leaves the control port, unanswered
        ──► limits of the tunnel, a connection to the agent ──► OK, and from then on bytes of the two ends
"""

from __future__ import annotations

import socket
import sys
from functools import partial

import trio

from tunneld.control.verbs import DaemonControl
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.engine.engine import Engine
from tunneld.errors import NoSuchTunnelError, NotAllowedError, UsageError
from tunneld.net.address import Private, parse_private
from tunneld.net.node_id import NodeId
from tunneld.policy.access import Role, check_role
from tunneld.policy.options import parse_seconds
from tunneld.policy.private import check_visit
from tunneld.tls.connection import TlsSocket
from tunneld.tunnel.ingress.private import VisitAnswers
from tunneld.tunnel.private_tunnels import PrivateDoor
from tunneld.tunnel.visitor import Visitor, VisitorEnd
from tunneld.wire.lines import ControlRequest

MAX_LIFE = 24 * 3600.0
"""Seconds of an invitation: what is sent in the morning may be used in the evening."""
HAS_TLS_ENDS = sys.platform == "linux"
"""Whether this system has epoll, which relays TLS connections without a task for each."""


async def visit_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Make this control connection a visitor of a private tunnel. The answer is sent once it has a connection to the
    agent, or when it is refused.
    """
    (reference,) = request.args
    if "@" in reference:
        check_role(caller.grant, Role.USER, request.verb, changes=True)
        address = parse_private(reference)
        check_visit(caller.known_grant, address)
    else:
        address = _address_of(daemon, reference)
    if not caller.can_hand_over:
        raise UsageError("visitTunnel belongs to the control port: its connection becomes that to the tunnel")
    door = daemon.service.privates.find(address)
    if door is None:
        raise NoSuchTunnelError(
            f"no private tunnel {address} is open: check the name and the id; its agent must run and use this relay"
        )
    return Reply(take=partial(_take_visitor, daemon.service.engine, door, caller))


def _address_of(daemon: DaemonControl, ticket: str) -> Private:
    """The tunnel for which a ticket is good. Raises `NotAllowedError`."""
    address = daemon.service.privates.invited(ticket, trio.current_time())
    if address is None:
        raise NotAllowedError("the one-time code is not valid, or no longer; ask for a new one (tunnel invite)")
    return address


async def invite_visitor(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Let a visitor without a credential ask for a private tunnel of the caller's, for some time."""
    reference, ticket, seconds = request.args
    address = parse_private(reference)
    await daemon.service.find(reference, caller.known_grant)
    NodeId.parse(ticket)
    try:
        life = parse_seconds(seconds)
    except ValueError as error:
        raise UsageError(f"{seconds!r} is {error}; usage: inviteVisitor NAME@ID TICKET SECONDS") from None
    if life > MAX_LIFE:
        raise UsageError(f"an invitation lasts {MAX_LIFE:.0f} s at most")
    daemon.service.privates.invite(address, ticket, trio.current_time(), life)
    return Reply(text=f"invited a visitor to {address} for {life:g} s")


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
        peer, reached = (caller.host, caller.port), (caller.local_host, 0)
        credential = caller.grant.name if caller.grant else ""
        answers = VisitAnswers(door.address, may_leave=isinstance(connection, TlsSocket))
        door.take(Visitor(end, peer, reached, credential=credential, early=early, answers=answers))


def _tls_end(engine: Engine, connection: TlsSocket, received: bytes) -> VisitorEnd | None:
    """The end for a TLS connection; None where it is broken, and closed."""
    if not HAS_TLS_ENDS:
        connection.close()
        return None
    from tunneld.engine.pump import Pump  # noqa: PLC0415  # Linux only
    from tunneld.engine.tls_end import TlsEnd  # noqa: PLC0415

    assert isinstance(engine, Pump)
    end = TlsEnd(engine, connection)
    end.may_leave = True
    end.unread(received)
    try:
        end.start()
    except OSError:
        connection.close()
        return None
    return end
