"""How an agent ends, and how long that takes. Pure.

told to end ──► withdraw ──► those who are here finish ──► gone
                   │            until `drain_timeout`, or told to end again: then they are cut
                   the relay sends nobody any more: visitors go to other agents of a shared tunnel,
                   or the tunnel is drained at the relay as well, and its address stays reserved
"""

from __future__ import annotations

CLOSE_WITHIN = 3.0
"""Seconds for the relay to hear that no more visitors are wanted; a person has pressed Ctrl-C and waits."""
DRAIN_WITHIN = 30.0
"""Seconds for visitors to finish: what the daemon gives them when it is told to end."""
FINISH_WITHIN = 5.0
"""Seconds more for the last octets that visitors left with us to reach the relay."""
