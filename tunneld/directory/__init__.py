"""The tunnels of a process, and the addresses reserved for their owners.

service       opens, closes and drains tunnels
requester     the peer that asks for it
registry      which tunnels are open, and the counters of those that have closed
reservations  the reserved addresses, as tunnels open and close
store         the task that writes reservations to disk
database      the file of reservations

Reservations are stored in SQLite: it is in the standard library, survives kill -9 and a power cut by design, and writes
only what changed. Replacing a whole TOML file would cost, with the maximum number of reservations, some hundred
kilobytes and two fsyncs for each tunnel that opens.
"""
