"""The process: what it is made of, what it shows to the outside, and how it ends."""

from tunneld.daemon.daemon import CUT, Daemon, run

__all__ = ["CUT", "Daemon", "run"]
