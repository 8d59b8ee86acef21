"""From one process to the next: a restart or an upgrade by which nobody loses a connection.

    running daemon ── leave() ──► Legacy ── pack ──► letter + descriptors ──┬── execve, same process ──┐
                                                                            └── systemd's FDSTORE ─────┤
    new daemon ◄── take_over() ── Legacy ◄── unpack ── letter + descriptors ◄──────────────────────────┘

What goes along: every listener, and of tcp tunnels the parked connections, the visitors that wait and the relays, with
the octets that were on their way. What cannot: control and HTTP connections and the carriers of webmux, whose state
(TLS, half-said frames) is in the process; they are ended in order, and whoever is behind them comes back by itself.

    letter.py     the description: JSON lines, strictly read, one a tunnel, and the octets on their way behind them
    baggage.py    descriptors by their inodes, which both sides know them by, and the sealed file with the letter
    given.py      listeners that systemd made: socket activation
    inherited.py  the environment of sd_listen_fds(3), and ours: pure
    successor.py  the two ways to the next process
"""

from tunneld.daemon.handover.bundle import FdBundle
from tunneld.daemon.handover.inherited import Inherited, check_given
from tunneld.daemon.handover.snapshot import Snapshot, pack, unpack
from tunneld.daemon.handover.successor import become, most_stored, received, settle, store

__all__ = [
    "FdBundle",
    "Inherited",
    "Snapshot",
    "become",
    "check_given",
    "most_stored",
    "pack",
    "received",
    "settle",
    "store",
    "unpack",
]
