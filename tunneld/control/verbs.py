"""The verbs of the control protocol: one function each, in the order of the table in `commands`.

Each function gets the daemon, the request and its caller, and returns a `Reply` or raises a `TunneldError`. To a
caller, tunnels of other credentials do not exist, unless it is an admin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from tunneld.config.keys import keys, value
from tunneld.config.schema import Settings
from tunneld.config.wording import literal
from tunneld.control.describe import describe_reservation, description_for, several_ports
from tunneld.directory.reply import DescribedItems, Reply
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.directory.sharing import find_site
from tunneld.egtp.passing import PassingService
from tunneld.errors import CertificateError, ShortageError, UsageError, reason_of
from tunneld.net.endpoint import format_peer
from tunneld.policy.options import TunnelOptions, parse_seconds
from tunneld.policy.units import count
from tunneld.sites.site import PortOrders
from tunneld.tls.store import CertificateStore
from tunneld.wire.lines import ControlRequest, Item

MAX_TRIM = 1_000_000
"""Idle server connections: far above any `tunnels.max_parked`."""


class CertificateOrders(PortOrders, Protocol):
    """The certificates for host names, as `acme.manager` keeps them."""

    def certificates(self) -> Sequence[Item]:
        """One item for each certificate."""

    def problems(self) -> Sequence[str]:
        """Which host names have no valid certificate, in a few words each."""

    async def renew(self, name: str) -> object:
        """Order a new certificate now. Raises `CertificateError` or `UsageError`."""

    async def trial(self, name: str, on_step: Callable[[str], None]) -> None:
        """Order a certificate that is thrown away. Raises `CertificateError` or `UsageError`."""


class DaemonControl(Protocol):
    """What the verbs need of the daemon."""

    @property
    def service(self) -> TunnelService:
        """The directory of tunnels."""

    @property
    def settings(self) -> Settings:
        """The settings in force."""

    def status(self) -> Item:
        """The item of `status`."""

    @property
    def mail(self) -> PassingService | None:
        """The messages of EGTP nodes; None on a system that has no such nodes."""

    def reload(self) -> Sequence[Item]:
        """Read the configuration file again; returns one item per changed key. On `ConfigError` nothing changes."""

    def penalties(self) -> Sequence[Item]:
        """The penalties in force after failed logins."""

    def pardon(self, address: str) -> bool:
        """Forget the failed logins from an address; returns whether there were any. Raises `UsageError`."""

    def shutdown(self, *, drain: bool) -> None:
        """Stop the process; with `drain`, connections may finish first."""

    @property
    def certificates(self) -> CertificateStore:
        """The certificates of all ports."""

    @property
    def certificate_orders(self) -> CertificateOrders:
        """The certificates for host names."""

    async def restart(self) -> None:
        """Begin to replace the process by the installed one. Raises `ConfigError`, `DrainingError` or `UsageError`."""


async def open_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Open a tunnel; the text is its server URI. With `described`, an item has its id and its client URI."""
    backend, *flags = request.args or ("tcp",)
    if flags not in ([], ["described"]):
        raise UsageError(f"unrecognized argument {flags[0]!r}; usage: openTunnel [backend [described]] [key=value ...]")
    options = TunnelOptions.parse(request.options)
    tunnel = await daemon.service.open_tunnel(backend, options, caller)
    several = {"ports": ports} if (ports := several_ports(tunnel)) is not None else {}
    items: list[Item] = [{"client": str(tunnel.client_uri), "id": tunnel.id, **several}] if flags else []
    return Reply(text=str(tunnel.server_uri), items=items)


async def get_tunnel_address(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """The text is the client URI of the tunnel with this server URI."""
    return Reply(text=str(await daemon.service.get_tunnel_address(request.args[0], caller.known_grant)))


async def list_tunnels(daemon: DaemonControl, _request: ControlRequest, caller: Requester) -> Reply:
    """One item for each open tunnel that the caller may see, oldest first. One that closes while the reply is produced
    has the phase `closed`.
    """
    tunnels = daemon.service.tunnels(caller.known_grant)
    return Reply(text=count(len(tunnels), "tunnel"), items=DescribedItems(tunnels, description_for(caller)))


async def show_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """One item for the tunnel, then one for each visitor."""
    tunnel = await daemon.service.find_local(request.args[0], caller.known_grant)
    now = trio.current_time()
    visitors: list[Item] = [
        {
            "visitor": format_peer(visitor.peer),
            "host": str(visitor.host) if visitor.host is not None else None,
            "credential": visitor.credential,
            "age": int(now - visitor.since),
            "up": relay.up,
            "down": relay.down,
        }
        for relay, visitor in tunnel.visitors.relays.items()
    ]
    return Reply(text=count(len(visitors), "visitor"), items=[description_for(caller)(tunnel), *visitors])


async def close_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Close a tunnel now; without `keep`, drop its reservation."""
    reference, *flags = request.args
    if flags not in ([], ["keep"]):
        raise UsageError(f"unrecognized argument {flags[0]!r}; usage: close URI|ID [keep]")
    tunnel = await daemon.service.close(reference, caller.known_grant, keep=bool(flags))
    return Reply(text=f"closed {tunnel.id}")


async def list_reservations(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """One item for each reservation that the caller may see, or for each with this address or name."""
    addresses, grant = daemon.service.reservations, caller.known_grant
    found = addresses.find(request.args[0], grant) if request.args else addresses.kept(grant)
    return Reply(text=count(len(found), "reservation"), items=DescribedItems(found, describe_reservation))


async def release_reservation(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Drop the reservation of a tunnel that is not open."""
    record = await daemon.service.reservations.release(request.args[0], caller.known_grant)
    return Reply(text=f"released {record.public} of {record.holder.name}")


async def drain_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Accept no new visitors; the tunnel closes when its last visitor leaves."""
    tunnel = await daemon.service.drain_one(request.args[0], caller.known_grant)
    return Reply(text=f"draining {tunnel.id}, {count(len(tunnel.visitors), 'visitor')} left")


async def join_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Let the agent that sent this request serve the tunnel, from the address of the request."""
    tunnel = await daemon.service.join(request.args[0], caller)
    return Reply(text=f"joined {tunnel.id}")


async def leave_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """The agent that sent this request stops serving the tunnel; the last agent drains it."""
    tunnel = await daemon.service.find_local(request.args[0], caller.known_grant)
    if tunnel.dismiss(caller.owner):
        return Reply(text=f"draining {tunnel.id}, {count(len(tunnel.visitors), 'visitor')} left")
    return Reply(text=f"left {tunnel.id}; remaining agents: {len(tunnel.agents)}")


async def trim_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Close idle server connections beyond a number to keep."""
    tunnel = await daemon.service.find_local(request.args[0], caller.known_grant)
    keep = request.args[1]
    if not (keep.isascii() and keep.isdigit() and len(keep) <= len(str(MAX_TRIM))):
        raise UsageError(f"COUNT must be a number of server connections to keep, not {keep!r}")
    return Reply(text=f"closed {count(tunnel.trim(int(keep), caller.host), 'idle server connection')} of {tunnel.id}")


async def share_tunnel(daemon: DaemonControl, request: ControlRequest, caller: Requester) -> Reply:
    """Return a link to a protected host name that lasts for some time, or revoke all links to it."""
    reference, word = request.args
    site = await find_site(daemon.service, reference, caller.known_grant)
    try:
        if word == "revoke":
            await site.revoke()
            return Reply(text=f"revoked all links to {site.name}")
        return Reply(text=await site.share(parse_seconds(word)))
    except ValueError as error:
        raise UsageError(f"{word!r} is {error}; usage: share NAME|URI|ID SECONDS|revoke") from None
    except OSError as error:
        raise ShortageError(f"could not store the state of shared links: {reason_of(error)}") from None


async def status(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """The process in one item."""
    return Reply(items=[daemon.status()])


async def settings(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each key that begins with the argument, with the value in force. Credentials are left out."""
    prefix = request.args[0].lower() if request.args else ""
    paths = [key.path for key in keys() if not key.repeated and f"{key.path}.".startswith(prefix)]
    if not paths:
        raise UsageError(f"no key begins with {prefix!r}; see tunnel.toml(5)")
    shown = ((path, value(daemon.settings, path)) for path in paths)
    items: list[Item] = [{"key": path, "value": None if found is None else literal(found)} for path, found in shown]
    return Reply(text=count(len(items), "key"), items=items)


async def list_penalties(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each penalty in force: of an address, or of one name at an address."""
    items = daemon.penalties()
    return Reply(text=count(len(items), "penalty", "penalties"), items=items)


async def pardon(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Forget the failed logins from an address, and so lift its penalties and those of names there."""
    (address,) = request.args
    had_failures = daemon.pardon(address)
    return Reply(text=f"pardoned {address}" if had_failures else f"no failed login from {address} is remembered")


async def list_certificates(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each certificate for host names, and for each name that waits for one."""
    items = daemon.certificate_orders.certificates()
    return Reply(text=count(len(items), "certificate"), items=items)


async def renew_certificate(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Order a new certificate for a host name now, and wait for it."""
    (name,) = request.args
    await daemon.certificate_orders.renew(name.lower())
    return Reply(text=f"renewed the certificate for {name.lower()}")


async def try_certificate(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Order a certificate that is thrown away; one item for each step, the last one may have failed."""
    (name,) = request.args
    steps: list[Item] = []
    try:
        await daemon.certificate_orders.trial(name.lower(), lambda step: steps.append({"step": step, "failed": False}))
    except CertificateError as error:
        steps.append({"step": str(error), "failed": True})
    return Reply(text="failed" if steps and steps[-1]["failed"] else "ok", items=steps)


async def reload(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """Read the configuration file again; one item per changed key."""
    items = daemon.reload()
    return Reply(text=f"{count(len(items), 'key')} changed", items=items)


async def shut_down(daemon: DaemonControl, request: ControlRequest, _caller: Requester) -> Reply:
    """Stop the daemon, now or after a drain."""
    if request.args not in {(), ("drain",)}:
        raise UsageError(f"unrecognized argument {request.args[0]!r}; usage: shutdown [drain]")
    drain = bool(request.args)
    daemon.shutdown(drain=drain)
    return Reply(text="draining, then stopping" if drain else "stopping")


async def restart(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """Replace the daemon with the installed program; tunnels and connections are kept as far as possible."""
    await daemon.restart()
    return Reply(text=f"restarting with {count(len(daemon.service.tunnels()), 'tunnel')}")
