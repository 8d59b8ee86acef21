"""Notes who asked for what: a line in the log and an event `request` for each request that ends or changes something of
other peers, before it is carried out.

    12:04:31 info    request                  verb=kick args="t4 203.0.113.5" credential=operator address=192.0.2.9

The owner of a tunnel sees the requests about it, with the credential; the address only where it is the owner's own.
"""

from __future__ import annotations

from enum import Enum

import structlog

from tunneld.control.verbs import DaemonControl
from tunneld.directory.requester import Requester
from tunneld.wire.lines import ControlRequest

log: structlog.stdlib.BoundLogger = structlog.get_logger("control")


class Noted(Enum):
    """What a verb is about, that it is noted."""

    NOTHING = "nothing"
    "It is not noted."
    TUNNEL = "tunnel"
    "The tunnel that its first argument names."
    RELAY = "relay"
    "The relay, or what several tunnels share."


async def note(daemon: DaemonControl, verb: str, about: Noted, request: ControlRequest, caller: Requester) -> None:
    """Note a request. Raises `NoSuchTunnelError` as the verb would, which is not noted."""
    if about is Noted.NOTHING:
        return
    grant, tunnel, is_owner = caller.known_grant, None, True
    if about is Noted.TUNNEL:
        record = await daemon.service.find(request.args[0], grant)
        tunnel, is_owner = record.id, record.owner == grant.name
    words = [*request.args, *(f"{key}={value}" for key, value in request.options.items())]
    facts = {"verb": verb, "args": " ".join(words) or None, "credential": grant.name or None}
    known = {key: value for key, value in facts.items() if value is not None}
    log.info("request", **known, address=caller.host, **({"tunnel": tunnel} if tunnel else {}))
    place = {"from": caller.host} if is_owner else {}
    daemon.service.events.publish("request", id=tunnel, **known, **place)
