"""`tunnel identity`, `tunnel trust` and `tunnel invite`: the keys of private tunnels, on this machine."""

from __future__ import annotations

import argparse
import os

from tunneld.agent.invitations import Invitations
from tunneld.cli.access import access
from tunneld.cli.common import complain, say
from tunneld.cli.peers import CODE_LIFE
from tunneld.config.trust import TrustedPeers, identity_path, load_identity
from tunneld.errors import UsageError, reason_of
from tunneld.net.address import Private
from tunneld.net.node_id import NodeId
from tunneld.policy.units import format_duration, parse_duration
from tunneld.tls.identity import Identity
from tunneld.tls.one_time import OneTimeCode


async def identity(options: argparse.Namespace) -> int:
    """Print the id of this user's key; with `create`, make the key first, unless there is one."""
    path = options.identity or identity_path()
    if options.action == "create":
        made = Identity.create()
        try:
            made.save(path)
        except FileExistsError:
            raise UsageError(f"there is an identity in {path} already; `tunnel identity` prints its id") from None
        except OSError as error:
            raise UsageError(f"could not create {path}: {reason_of(error)}") from None
        complain(f"tunnel: created {path}; keep it secret, and back it up: nothing can replace it")
    say(str(load_identity(path).id))
    return os.EX_OK


async def trust(options: argparse.Namespace) -> int:
    """Add, remove or list the peers that this user knows."""
    peers = TrustedPeers()
    try:
        match options.action:
            case "add":
                peers.add(options.name, NodeId.parse(options.id))
            case "remove":
                peers.remove(options.name)
            case _:
                for name, node in peers.all().items():
                    say(f"{name}\t{node}")
    except OSError as error:
        raise UsageError(f"could not change {peers.path}: {reason_of(error)}") from None
    return os.EX_OK


async def invite(options: argparse.Namespace) -> int:
    """Print a one-time code, once the relay and the agent on this machine know about it."""
    seconds = options.seconds or parse_duration(CODE_LIFE)
    address = Private(load_identity(options.identity).id, options.name)
    code = OneTimeCode.create()
    async with access(options).connect() as client:
        await client.call("inviteVisitor", str(address), code.ticket, str(seconds))
    try:
        Invitations().add(options.name, code, seconds)
    except OSError as error:
        raise UsageError(f"could not store the invitation: {reason_of(error)}") from None
    say(str(code))
    pin = f" --pin {options.pin}" if options.pin else ""
    complain(
        f"tunnel: valid for one visit to {options.name!r} within {format_duration(seconds)}; the visitor runs: "
        f"tunnel visit --once CODE --relay {options.relay}{pin}"
    )
    return os.EX_OK
