"""The SSH backend: a hidden server needs nothing but its own `ssh` client.

    side         the server side of a tunnel; the only file here that does not import asyncssh
    port         the shared port: accepts connections, supervises logins, one task per connection
    login        authentication: the key of an open tunnel, or a public key of a credential
    forwards     `-R` opens a tunnel or joins one; a client that reconnects gets its former address
    console      the sessions of a user: a few commands, and lines about the tunnels
    terminal     what a session displays
    server       asyncssh's callbacks: authentication, requests, sessions
    paths        which classes serve connections, by the version of asyncssh
    portable     connections and channels with the public interface of asyncssh alone: slow
    connection   one client's connection, from accept to close
    negotiation  which algorithms are offered, and in which order
    restricted   which requests are refused, limits, and what is the peer's fault
    fast         asyncssh's connection with a fast path: packets between byte buffers, without asyncio
    transport    the socket below, read and written in the pump
    carrier      the channels of a connection: implements `mux.channel.ChannelTransport`
    channel      one of them, in the terms of RFC 4254
    forwarded    its end, which a relay joins to a visitor
    gcm          the cipher of the fast path
    loop         the asyncio event loop, a Trio task, in which asyncssh's tasks and timers run
    host_key     the relay's host key

The work is shared with asyncssh, which does key exchange, authentication, requests and sessions: everything that is
rare and must be right. What happens per visitor and per byte is ours: a forwarded channel is a `mux.channel.Channel`,
which the pump joins to the visitor's socket, without a task and without an event loop between. asyncssh's tasks and
timers run in an asyncio loop on Trio; no data packet waits for it.

    asyncssh.SSHServerConnection < NegotiatingConnection < RestrictedConnection < FastConnection

These subclasses override private methods of asyncssh, which a new release may change. With a release that is not known,
portable.py takes their place; paths.py decides.
"""
