"""All tunnels of a process: opening and finding them (`service`, `registry`), and the addresses kept for their owners
(`reservations`, `store`, `database`).

Reservations are stored in SQLite: the standard library has it, it survives kill -9 and a power cut by design, and it
writes only what changed. Replacing a whole TOML file would cost, with the most reservations there may be, some hundred
kilobytes and two fsyncs for each tunnel that opens.
"""
