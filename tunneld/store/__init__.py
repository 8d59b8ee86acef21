"""What survives the process: the reservations, in a file of SQLite.

SQLite, since the standard library has it, it survives kill -9 and a power cut by design, and it writes what changed
instead of everything. A file of TOML that is replaced as a whole would cost, with the most reservations there may be,
some hundred kilobytes and two fsyncs for each tunnel that opens.

    database.py     the file, synchronous: opened, read, written, told apart from others and from damaged ones
    ledger.py       its task: one thread at a time, all that changed meanwhile in one transaction
"""

from tunneld.store.ledger import ReservationStore

__all__ = ["ReservationStore"]
