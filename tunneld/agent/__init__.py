"""The agent: runs beside the hidden server, dials out to the relay, and relays visitors to the local server.

    expose.py          one exposure: connects, opens the tunnel, and after a loss does both again; shutdown.py ends it
    exposures.py       several exposures in one process
    relay_connection.py  the control connection to a relay, and its carriers, which all of them share
    session.py         one open tunnel at one relay: checks it, refills its connections, closes it
    request.py         how a tunnel is opened: backend, options, encryption
    source.py          what a source of connections is: either
    pool.py              connections parked at the relay ahead of demand; handshake_pool.py: with a key or TLS, or
    carriers.py          webmux connections that carry many visitors each, and several tunnels: agent_carrier.py is one
    end_visitor.py     visitors that arrive on an End (a channel, or a TLS connection)
    visitors.py        each visitor: dials the local server, joins the two, counts
    inspection.py      taps of these connections, for the inspector
    local.py           the local server: its addresses, how it is dialled, whether anything listens there
    health.py          health checks of the local server, and the HTTP answer while it is unhealthy
    network.py         detects network changes and suspends; backoff.py: delays between attempts
    private.py         the host of a private tunnel; private_session.py: one visitor's streams, invitations.py
    visit.py           the visitor of one; visit_port.py: its clients, visit_sessions.py: what carries them
    access.py          how the relay is reached, and with which credential
    config.py          what the user configured; expose_file.py reads it from expose.toml
    events.py          what the agent reports about itself
    listener.py        the same connections as a `trio.abc.Listener`, for Trio programs

Requests to the relay go through `tunneld.client`. Nothing here imports the daemon.
"""
