"""Addresses and sockets.

address      the addresses that tunnels hold: ports and host names
endpoint     URIs, hosts, ports and networks: parsed, printed, compared
sockets      listening sockets, free ports, the limit of descriptors
accept       what an error of accept(2) means
liveness     whether the peer of a silent connection is still there
listeners    the listeners of one service, which a reload can replace
dial         outgoing connections
"""
