"""EGTP nodes: messages addressed to keys, and byte streams in them.

    passing      passes opaque messages between other nodes: `pass this along`, `message for you`
    mailbox      keeps them until the recipient has fetched them, within quotas

The codecs are in `tunneld.wire.egtp`.
"""
