"""What is allowed, as pure functions and values: nothing here reads a clock, a socket or a file.

access        roles and grants: what a credential may do
options       the options of openTunnel, and the parsers of their values
limits        the limits of one tunnel, from the configuration, the grant and the options
admission     which visitors a tunnel accepts
networks      addresses as numbers, and sets of networks
rates         token buckets: visitors per source and time, log lines per time
reservations  the table of reserved addresses
"""
