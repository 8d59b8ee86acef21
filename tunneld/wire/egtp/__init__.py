"""EGTP v1, the message transport of Mojo Nation and Mnet (2002), as pure codecs. Nothing here reads a clock, a socket
or a source of randomness: times, timeouts and random octets are arguments.

A node is known by the id of its public key. Nodes exchange requests and responses of up to 4 MiB; there are no byte
streams and there is no order. One message on its way:

    mojo message (mencode) -> zlib -> envelope (encrypted, signed) -> TCP frame, or inside a message to a relay

    frames     length-prefixed frames of a TCP connection, in both directions
    ids        ids and their text form, mojosixbit
    fields     typed access to decoded dictionaries, with errors that name the key
    messages   requests and responses, and the hints for keeping connections
    requests   the table of outstanding requests: which response fits, what times out
    addresses  the address of a node: its strategies, and which of two is better
    relaying   the bodies of the messages with which a relay passes envelopes on
    steps      long work in steps: classic encryption, compression
    packing    compression inside the envelope
    envelope   the modern envelope, whose TLS is in `tunneld.egtp.session`
    streams    byte streams in messages: frames, and the state of each stream
    delivery   numbers messages, so that each is delivered once and in order
    attaching  how a node attaches to its streams
    fast       the two messages that carry streams, by their fixed beginnings
    mesgen     the envelope of 2002, which is weak; only this package needs cryptography

There is no specification. The facts were read in the Python implementation of 2002 and checked against its output
(tests/wire/egtp/vectors.txt). Where that implementation was lax, ours is strict on receipt: ids, lengths and numbers
have one form each. All errors in the input are `RemoteProtocolError`.
"""
