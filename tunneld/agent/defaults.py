"""The defaults and limits of the settings of an exposure. They are apart so that --help does without Trio."""

from __future__ import annotations

LINGER = 60.0
"""Seconds that a connection may be idle after one direction has ended, as on the relay."""
DRAIN_WITHIN = 30.0
"""Seconds for visitors to finish: the same as the relay gives them when it is told to drain."""

MIN_POOL, MAX_POOL = 8, 200
"""Connections parked at the relay without load and at most; see pool.py."""
LARGEST_POOL = 100_000
"""The maximum of both: more than a process can have descriptors by default."""
PARKED_KEEPALIVE = 15.0
"""Seconds of silence before a probe. NATs and firewalls forget a silent connection after 2 minutes or more, so a probe
keeps it known. Of one that is forgotten all the same the agent learns after 27 seconds, while visitors still wait for
another one: `tunnels.pairing_timeout` is 30.
"""
PARKED_MAX_AGE = 600.0
"""Seconds after which a parked connection is replaced: some firewalls forget a connection at a certain age, whatever
crosses it. A quarter of an hour is the shortest in use.
"""
MAX_POLL = 3600
"""Seconds between polls at most. Relays have a limit of their own, by default 5 minutes: a visitor waits that long."""

CHECK_INTERVAL = 10.0
"""Seconds between two health checks: with three failures it takes half a minute to notice, as with common load
balancers.
"""
CHECK_TIMEOUT = 5.0
"""Seconds for an answer: a healthy server on the same machine takes milliseconds, a swapping one takes seconds."""
UNHEALTHY_AFTER = 3
"""Failures in a row: one may be a restart."""
HEALTHY_AFTER = 2
"""Successes in a row: one may be luck."""
MAX_CHECKS = 100
"""The maximum of both counts: minutes, at the shortest useful interval."""
CHECK_PATH = "/"
"""The path of the HTTP request."""

LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
"""The authority that issues certificates for `https_here`, as in config/certificates.py."""
