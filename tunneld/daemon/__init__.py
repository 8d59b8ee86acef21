"""The daemon process: its parts put together, signals, systemd, logs, privileges, and the handover to its successor."""

from tunneld.daemon.daemon import CUT, Daemon, run

__all__ = ["CUT", "Daemon", "run"]
