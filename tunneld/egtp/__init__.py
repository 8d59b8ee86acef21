"""EGTP nodes: messages addressed to keys, and byte streams in them.

    passing      passes opaque messages between other nodes: `pass this along`, `message for you`
    service_connection  a connection of a node that uses that service
    service_task  reads and writes its socket
    classic      the envelopes of 2002 on such a connection
    freshness    tells replayed requests from fresh ones
    mailbox      keeps them until the recipient has fetched them, within quotas

The codecs are in `tunneld.wire.egtp`.
"""
