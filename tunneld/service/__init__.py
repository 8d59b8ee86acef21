"""All tunnels of a process.

service     the two calls, and what an operator does to the tunnels that they made
addresses   which address is whose, as tunnels come and go
sharing     several agents behind one name
"""

from .service import AtEnd, Requester, TunnelService, at_once

__all__ = ["AtEnd", "Requester", "TunnelService", "at_once"]
