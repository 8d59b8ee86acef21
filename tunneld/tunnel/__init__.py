"""One tunnel: its nursery, its phase, its two sides.

opening      what is known of a tunnel before it is open
terms        what its options and the configuration come to together
tunnel       the nursery, the phase, and what joins its two sides; the server side is a backend, see backends/
client_side  the half that clients connect to
visitors     a visitor's way: admitted, paired, relayed, gone
refusals     who was turned away
proxied      who a trusted proxy says that a visitor is
members      the agents that serve it, and from where
clocks       the times after which a tunnel closes
legacy       what a tunnel leaves to its successor in the next process
"""

from .opening import TunnelSpec
from .refusals import REFUSALS_LOGGED
from .tunnel import STOPPED, Phase, Tunnel

__all__ = ["REFUSALS_LOGGED", "STOPPED", "Phase", "Tunnel", "TunnelSpec"]
