"""Multiplexed connections: one carrier between agent and relay has a channel for every visitor.

    transport    what is below a carrier: either
    connection     a socket, plain or TLS, read and written without blocking, or
    end_connection another end: the TLS of a private tunnel
    carrier      one connection and its WebMUX codec; finds channels by session id
    send_buffer  pending output and the one place that writes it
    heartbeat    keep-alive: does the peer still answer?
    ping         the WebMUX session that a heartbeat asks with
    channel      one byte stream, an `engine.end.End`; webmux_channel is that of a `Carrier`, ssh has its own
    window       receive windows: how many bytes a channel may receive (pure)
    limits       sizes and times of a carrier

WebMUX calls a channel a session; that word stays inside its codec.
"""
