"""SSH: a hidden server needs nothing but the `ssh` that it has.

    port        the shared port: newcomers, their logins, their deadlines; a task for each connection
    login       who connects: by the key of an open tunnel, or by a public key of a credential
    forwards    what `-R` asks for becomes a tunnel, or joins one; who comes back gets the former address
    words       the few words that a person at the other end may say, and their answers
    board       what is shown there
    negotiation which algorithms, and by whose order
    narrow      what of asyncssh's connection is not answered
    connection  asyncssh's connection, on the short path: packets between octets of ours
    transport   the socket below, read and written in the pump
    carrier     the channels of a connection: the `Carries` of session/channel.py
    flow        one of them, in the words of RFC 4254
    gcm         the cipher of the short path
    loop        the asyncio loop, a Trio task, that asyncssh's tasks and timers run in
    hostkey     the key by which the relay is known

The work is shared with asyncssh: it does the key exchange, the logins, requests and sessions, all that is rare and must
be right. What comes for every visitor and every octet is ours: a forwarded channel is a `session.Channel`, joined to
the visitor's socket in the pump, without a task and without a loop between. asyncssh's tasks and timers run in an
asyncio loop on Trio; no packet waits for it.
"""
