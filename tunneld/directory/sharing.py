"""Links to protected host names: which tunnel a request means, and what it gets. See `sites.links` for the links."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tunneld.directory.service import TunnelService
from tunneld.errors import NoSuchTunnelError, UsageError
from tunneld.net.address import HostName
from tunneld.policy.access import Grant
from tunneld.policy.names import complete_name
from tunneld.sites.links import PARAMETER, LinkScope
from tunneld.sites.names import SharedNames
from tunneld.tunnel.tunnel import Tunnel


@dataclass(frozen=True, slots=True)
class SharedSite:
    """A host name of an open tunnel, with which visitors need a password or a link."""

    tunnel: Tunnel
    name: HostName

    @property
    def scope(self) -> LinkScope:
        """What a link to it opens."""
        return LinkScope(self.tunnel.spec.credential, self.name)

    @property
    def names(self) -> SharedNames:
        """The host names of this relay."""
        names = self.tunnel.spec.services.names
        assert names is not None
        return names

    async def share(self, seconds: float) -> str:
        """A link that lasts for this time. Raises `UsageError`."""
        if self.name.is_wildcard:
            raise UsageError(f"{self.name} stands for many host names; share a tunnel with a name of its own")
        if not self.tunnel.spec.options.auth:
            raise UsageError(f"every visitor can see {self.name}: it needs no link; protect it with auth")
        token = await self.names.guards.issue_link(self.scope, time.time(), seconds)
        return f"{self.names.uri(self.name)}?{PARAMETER.decode()}={token}"

    async def revoke(self) -> None:
        """Make all its links void. Raises `LimitReachedError`."""
        await self.names.guards.revoke_links(self.scope, time.time())


async def find_site(service: TunnelService, reference: str, grant: Grant) -> SharedSite:
    """The site of an open tunnel with this label, host name, id, URI or port. Raises `NoSuchTunnelError`, also for a
    tunnel of another credential, or `UsageError` where it has no host name.
    """
    if (site := await _find_named(service, reference, grant)) is not None:
        return site
    try:
        tunnel = service.live.labelled(reference, grant) or await service.find_local(reference, grant)
    except NoSuchTunnelError:
        raise NoSuchTunnelError(
            f"no open tunnel is called {reference!r}: use its label or host name, or an id, a URI or a port as list "
            "shows it"
        ) from None
    if not tunnel.spec.names:
        raise UsageError(f"tunnel {tunnel.id} has no host name; links exist for host names only")
    return SharedSite(tunnel, tunnel.spec.names[0])


async def _find_named(service: TunnelService, reference: str, grant: Grant) -> SharedSite | None:
    """The site with exactly this host name, which may be a label under the relay's domain."""
    try:
        name = complete_name(reference, service.settings().names.domain)
        tunnel = await service.find_local(str(name), grant)
    except (NoSuchTunnelError, UsageError):
        return None
    return SharedSite(tunnel, name) if name in tunnel.spec.names else None
