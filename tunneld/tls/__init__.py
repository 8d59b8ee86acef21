"""TLS: connections on non-blocking sockets (`connection`), contexts from certificate files (`contexts`), pinned
certificates (`pins`), self-signed certificates (`self_signed`), and certificates about to expire (`expiry`).
"""
