"""EGTP nodes: messages addressed to keys, and byte streams in them.

    session      the modern envelope between two nodes: TLS 1.3 inside the messages, pinned keys on both sides
    link         one TCP connection of two nodes that have a session; read and written by the pump
    carrier      an association of two nodes: channels, whose frames are in messages
    attachment   how its messages reach the peer: over one link after another, or by answers to polls
    channel      one byte stream of it, an `engine.end.End`
    output       numbers what a carrier sends, and keeps it until it is acknowledged
    owners       what links and associations call
    limits       sizes and times
    handshake    the first messages on a new connection, in a task
    passing      passes opaque messages between other nodes: `pass this along`, `message for you`
    service_connection  a connection of a node that uses that service
    service_task  reads and writes its socket
    classic      the envelopes of 2002 on such a connection
    freshness    tells replayed requests from fresh ones
    mailbox      keeps them until the recipient has fetched them, within quotas

The codecs are in `tunneld.wire.egtp`. A stream survives the loss of its link: the peer makes another one, and what was
not acknowledged is sent again.
"""
