"""Backends: the ways from a tunnel to its hidden server.

    tcp       the hidden server opens a TCP connection per visitor, in advance; see tcp.py and, with a key, keyed.py
    webmux    an agent's multiplexed connections (carriers) to a shared port; see webmux.py and webmux_port.py
              (webmux_shared.py: a connection for several tunnels)
    egtp      EGTP nodes on a shared port, with streams in messages; see egtp.py and egtp_port.py
    ssh       `ssh -R` connections to a shared port; see ssh/

A backend is a class that implements `tunneld.tunnel.server_side.ServerSide`. It defines what *dial* means: take a
parked TCP connection, or open a channel on a carrier. No other package depends on which backend a tunnel has; a new
backend is one file here and one row of `BACKENDS`.
"""

import sys

from tunneld.backends.tcp import TcpServerSide
from tunneld.tunnel.server_side import Backend

BACKENDS: dict[str, Backend] = {"tcp": TcpServerSide}
"""The backends of this platform, by the names that the control verb openTunnel accepts."""

if sys.platform == "linux":  # carriers need the pump, which needs epoll
    from tunneld.backends.egtp import EgtpServerSide
    from tunneld.backends.ssh.side import SshServerSide
    from tunneld.backends.webmux import WebMuxServerSide

    BACKENDS["webmux"] = WebMuxServerSide
    BACKENDS["ssh"] = SshServerSide
    BACKENDS["egtp"] = EgtpServerSide
