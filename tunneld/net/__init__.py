"""Addresses and sockets.

address      the addresses that tunnels hold: ports and host names
endpoint     URIs, hosts, ports and networks: parsed, printed, compared
sockets      listening sockets, free ports, the limit of descriptors
accept       what an error of accept(2) means
listeners    the listeners of one service, which a reload can replace
dial         outgoing connections
"""
