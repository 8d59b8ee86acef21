"""One tunnel: its nursery, its phase, its two sides.

spec         what is known of a tunnel before it is open
limits       what its options and the configuration come to together
tunnel       the nursery, the phase, and what joins the two sides
server_side  what a tunnel asks of a backend
keys         the keys in server URIs, for ports that tunnels share
client_side  the listener for visitors
visitors     visitors: admitted, relayed, counted
agents       the agents that serve it, and the addresses they may connect from
timeouts     the times after which a tunnel closes
events       what `watch` reports
snapshot     what is handed to the next process
"""
