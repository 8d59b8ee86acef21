"""The hidden servers of the benchmark that are not nginx, a process each: `python -m benchmarks.hidden KIND`.

`bulk` sends to whoever connects, as fast as the connection takes it; `greet` says one octet and then holds the
connection. Each prints its port and runs until it is ended.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from contextlib import suppress

LOOPBACK = "127.0.0.1"
BLOCK = 4 << 20  # octets sent at once, from the page cache: no copy, so the sender is no bottleneck
BACKLOG = 4096


def bulk(listener: socket.socket) -> None:
    """Send to everybody, a thread each."""
    memory = os.memfd_create("bulk")
    os.write(memory, os.urandom(BLOCK))
    while True:
        client, _ = listener.accept()
        threading.Thread(target=send, args=(client, memory), daemon=True).start()


def send(client: socket.socket, memory: int) -> None:
    """Send until the client has gone."""
    with client, suppress(OSError):
        while True:
            os.sendfile(client.fileno(), memory, 0, BLOCK)


def greet(listener: socket.socket) -> None:
    """Say one octet to everybody, so that they know that they got through; forget those who leave."""
    clients: dict[int, socket.socket] = {}
    events = select.epoll()
    events.register(listener, select.EPOLLIN)
    while True:
        for number, _ in events.poll():
            if number == listener.fileno():
                client, _ = listener.accept()
                clients[client.fileno()] = client
                events.register(client, select.EPOLLIN)
                with suppress(OSError):
                    client.send(b"!")
            else:
                clients.pop(number).close()  # a client has nothing to say, so this is its end


KINDS = {"bulk": bulk, "greet": greet}

if __name__ == "__main__":
    with socket.create_server((LOOPBACK, 0), backlog=BACKLOG) as server:
        print(server.getsockname()[1], flush=True)
        KINDS[sys.argv[1]](server)
