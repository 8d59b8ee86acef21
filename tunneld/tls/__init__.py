"""TLS: connections on non-blocking sockets (`connection`) and as Trio streams (`stream`), contexts from certificate
files (`contexts`), pinned certificates (`pins`), self-signed certificates (`self_signed`) and files with private keys
(`private_files`).

The certificates of a relay: one of them (`certificate`), and all of them by port and by name (`store`).
"""
