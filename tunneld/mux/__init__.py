"""Multiplexed connections: one carrier between agent and relay holds a channel for every visitor.

    connection   the connection below a carrier, plain or in TLS, read and written without waiting
    carrier      one connection and its codec: channels by session id
    send_buffer  bytes to be written: the one place that writes
    heartbeat    is the peer alive?
    channel      one byte stream, an `engine.end.End`
    window       how many bytes a channel may receive (pure)

WebMUX calls a channel a session; that word stays inside its codec.
"""
