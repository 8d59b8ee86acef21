"""The verbs that disconnect visitors, keep networks out and limit what visitors may do: kick, ban, unban, bans, set."""

from __future__ import annotations

from collections.abc import Callable

import trio

from tunneld.control.describe import description_for
from tunneld.control.verbs import DaemonControl
from tunneld.directory.changing import CHANGEABLE, NO_LIMIT
from tunneld.directory.reply import Reply
from tunneld.directory.requester import Requester
from tunneld.errors import UsageError
from tunneld.net.endpoint import Peer, format_peer, parse_network
from tunneld.policy.bans import MAX_BAN_TIME
from tunneld.policy.networks import NetworkSet, read_address
from tunneld.policy.options import format_option, parse_seconds
from tunneld.policy.units import count
from tunneld.wire.lines import ControlRequest, Item

BAN_TIME = 3600.0
"""Seconds of a ban for which no time is given."""


async def kick(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Cut the connections of one visitor of a tunnel, or of all from an address or network."""
    reference, who = request.args
    tunnel = await daemon.service.find_local(reference, caller.known_grant)
    kicked = tunnel.visitors.kick(_chosen_by(who), caller.known_grant.by_request("disconnected"))
    return Reply(text=f"disconnected {count(kicked, 'visitor')} of {tunnel.id}")


def _chosen_by(who: str) -> Callable[[Peer], bool]:
    """Which visitors are meant: `203.0.113.5:4242`, as `show` prints it, or an address or network. Raises
    `UsageError`.
    """
    try:
        network = parse_network(who)
    except UsageError:
        if who.rpartition(":")[0].strip("[]") == "":
            raise
        return lambda peer: format_peer(peer) == who
    networks = NetworkSet([network])
    return lambda peer: _is_in(networks, peer)


def _is_in(networks: NetworkSet, peer: Peer) -> bool:
    try:
        return read_address(peer[0]) in networks
    except ValueError:  # a visitor of a private tunnel, or through a Unix socket
        return False


async def ban(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Keep a network out for some time, and disconnect its visitors."""
    network = parse_network(request.args[0])
    try:
        seconds = parse_seconds(request.args[1]) if len(request.args) > 1 else BAN_TIME
    except ValueError as error:
        raise UsageError(f"{request.args[1]!r} is {error}; usage: ban NETWORK [SECONDS]") from None
    if seconds > MAX_BAN_TIME:
        raise UsageError(
            f"a ban lasts at most {MAX_BAN_TIME:.0f} s; to keep a network out for good, use tunnels.deny_from"
        )
    if _is_in(NetworkSet([network]), (caller.host, 0)):
        raise UsageError(f"{network} contains your own address, {caller.host}")
    daemon.service.bans.add(network, trio.current_time() + seconds)
    reason, chosen = caller.known_grant.by_request("banned"), _chosen_by(str(network))
    kicked = sum(tunnel.visitors.kick(chosen, reason) for tunnel in daemon.service.tunnels())
    return Reply(text=f"banned {network} for {seconds:g} s, disconnected {count(kicked, 'visitor')}")


async def unban(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """End a ban."""
    network = parse_network(request.args[0])
    if not daemon.service.bans.lift(network):
        raise UsageError(f"{network} is not banned; bans lists the networks that are")
    return Reply(text=f"lifted the ban of {network}")


async def set_limits(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Change limits of an open tunnel. The text has the values in force, which may be lower than requested."""
    if not request.options:
        raise UsageError(f"nothing to change: give at least one of {', '.join(f'{key}=' for key in CHANGEABLE)}")
    tunnel = await daemon.service.change(request.args[0], request.options, caller.known_grant)
    values = {key: getattr(tunnel.spec.options, key) for key in request.options}
    shown = " ".join(f"{key}={format_option(value) if value else NO_LIMIT}" for key, value in values.items())
    return Reply(text=f"changed {tunnel.id}: {shown}", items=[description_for(caller)(tunnel)])


async def list_bans(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each ban in force."""
    bans = daemon.service.bans.report(trio.current_time())
    items: list[Item] = [{"network": str(one.network), "left": int(one.left)} for one in bans]
    return Reply(text=count(len(items), "ban"), items=items)
