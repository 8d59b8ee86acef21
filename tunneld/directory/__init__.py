"""Which tunnels there are, and the addresses reserved for their owners.

record          a tunnel as any node may know it, and the protocol of a directory of such records
local           the directory of a relay that is one process
reservations    the reserved addresses, as tunnels open and close
live            the open tunnels of this process, and the counters of those that have closed
opening         how a tunnel is opened: all or nothing
agreement       a request whose name has a tunnel already: shared, replaced or refused
host_names      which host names a tunnel gets
service         opens, closes and drains tunnels
requester       the peer that asks for it
changing        limits of open tunnels, changed on request and by a reload
store           the task that writes reservations to disk
database        the file of reservations
event_history   the past events, and the task that writes them to disk
event_database  the file of events
sqlite_file     what both files have in common
loop_delay      how late the event loop is

Reservations are stored in SQLite: it is in the standard library, survives kill -9 and a power cut by design, and writes
only what changed. Replacing a whole TOML file would cost, with the maximum number of reservations, some hundred
kilobytes and two fsyncs for each tunnel that opens.
"""
