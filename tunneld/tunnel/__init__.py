"""One tunnel: its nursery, its phase, its two sides.

opening      what is known of a tunnel before it is open
tunnel       the nursery, and what joins its two sides; the server side is a backend, see backends/
client_side  the half that clients connect to
proxied      who a trusted proxy says that a visitor is
members      the agents that serve it, and from where
clocks       the times after which a tunnel closes
legacy       what a tunnel leaves to its successor in the next process
"""

from .opening import Opening
from .tunnel import REFUSALS_LOGGED, STOPPED, Phase, Tunnel

__all__ = ["REFUSALS_LOGGED", "STOPPED", "Opening", "Phase", "Tunnel"]
