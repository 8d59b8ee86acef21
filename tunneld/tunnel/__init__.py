"""One tunnel: a nursery, a phase, and its two sides.

spec         the request for a tunnel, resolved, before it opens
tunnel       the tunnel: its nursery, its phase, its two sides
server_side  the contract between a tunnel and its backend
keys         the keys in the server URIs of ports that tunnels share
client_side  the listener for visitors
visitors     visitors: accepted or refused, relayed, counted
agents       the agents of a tunnel, and the addresses that server connections may come from
timeouts     the times after which a tunnel closes
events       the events of `watch`
snapshot     what one process hands over to the next
"""
