"""The program beside the hidden server that dials out for it: open a tunnel, park connections, dial, relay, come back.

    expose.py     the loop around everything: a tunnel, a control connection, and after a loss both again
    keeper.py     what is asked of the relay: open, look after, trim, close
    pool.py       connections parked at the relay, ahead of demand
    sizing.py     how many: pure
    carriers.py   or, with webmux, connections that each bring many visitors; secured.py: the way to one of those
    visitors.py   each visitor's way from the pool to the local server, and the counts
    local.py      the local server: its addresses, and how it is dialled
    health.py     whether the local server is well: pure; probe.py looks, watch.py has it acted upon
    backoff.py    how long to wait after a loss: pure; wake.py ends a wait early
    plan.py       what is wanted of an exposure; planfile.py reads many from expose.toml
    fleet.py      many exposures in one process
    listener.py   the same pool as a `trio.abc.Listener`, for Trio programs

What it asks of the relay goes through `tunneld.client`; of the daemon it knows nothing.
"""
