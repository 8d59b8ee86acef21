"""Server sides: what stands between a tunnel and its hidden server.

A backend says what *dial* means: take the next parked TCP connection, open a channel on a carrier. Nothing above
this floor asks which backend it is; a new one is a file here and a line in `BACKENDS`.
"""

import sys

from tunneld.backends.tcp import TcpServerSide
from tunneld.tunnel.server_side import Backend

BACKENDS: dict[str, Backend] = {"tcp": TcpServerSide}
"""Backend names as openTunnel takes them."""

if sys.platform == "linux":  # carriers live in the pump
    from tunneld.backends.ssh.side import SshServerSide
    from tunneld.backends.webmux import WebMuxServerSide

    BACKENDS["webmux"] = WebMuxServerSide
    BACKENDS["ssh"] = SshServerSide
