"""Handover: a restart or an upgrade that keeps connections open.

    running daemon ── export ──► Snapshot ── pack ──► manifest + descriptors ──┬── execve, same process ──┐
                                                                               └── systemd's FDSTORE ─────┤
    new daemon ◄── adopt ── Snapshot ◄── unpack ── manifest + descriptors ◄───────────────────────────────┘

Kept: all listeners, and for tcp tunnels the parked connections, waiting visitors and relayed connections with their
buffered bytes. Not kept: control and HTTP connections and carriers, since their state (TLS, half a frame) is inside the
process. These are closed, and their peers reconnect.

    snapshot.py   what is handed over, into the bundle and out of it
    manifest.py   the manifest: strict JSON lines, one for each tunnel, followed by the buffered bytes
    bundle.py     descriptors, identified by their inodes, and the sealed file with the manifest
    inherited.py  the environment of sd_listen_fds(3) and ours, and listeners that systemd opened
    successor.py  the two ways to the next process
"""

from tunneld.daemon.handover.bundle import FdBundle
from tunneld.daemon.handover.inherited import Inherited, adopt_listeners
from tunneld.daemon.handover.snapshot import Snapshot, pack, unpack
from tunneld.daemon.handover.successor import become, receive, release_stored, store, store_capacity

__all__ = [
    "FdBundle",
    "Inherited",
    "Snapshot",
    "adopt_listeners",
    "become",
    "pack",
    "receive",
    "release_stored",
    "store",
    "store_capacity",
    "unpack",
]
