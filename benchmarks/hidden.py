"""Hidden servers of the benchmark other than nginx, each a process: `python -m benchmarks.hidden KIND [HOST]`.

`bulk` sends to each client as fast as the connection permits. `greet` sends one byte and holds the connection. `any`
does what the first byte of the client says: b is bulk; s reads, and reports the total; a answers each request, which is
a number in four bytes, with that many bytes. Each prints its port and runs until it is killed.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from contextlib import suppress

LOOPBACK = "127.0.0.1"
BLOCK = 4 << 20  # bytes sent in one call, from the page cache: without a copy, so the sender is no bottleneck
BACKLOG = 4096
REPORT_INTERVAL = 0.02  # seconds between two totals


def bulk(listener: socket.socket) -> None:
    """Send to each client in a thread of its own."""
    memory = block()
    while True:
        client, _ = listener.accept()
        threading.Thread(target=send, args=(client, memory), daemon=True).start()


def block() -> int:
    """Make a descriptor of the data to send."""
    memory = os.memfd_create("bulk")
    os.write(memory, os.urandom(BLOCK))
    return memory


def send(client: socket.socket, memory: int) -> None:
    """Send until the client disconnects."""
    with client, suppress(OSError):
        while True:
            os.sendfile(client.fileno(), memory, 0, BLOCK)


def greet(listener: socket.socket) -> None:
    """Send one byte to each client, as a sign that it is connected to the server, and hold the connection."""
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
                clients.pop(number).close()  # clients send nothing, so this is an EOF


def swallow(client: socket.socket) -> None:
    """Read until the client disconnects, and send it the total in eight bytes from time to time."""
    buffer, total, reported = bytearray(1 << 20), 0, time.monotonic()
    with client, suppress(OSError):
        while size := client.recv_into(buffer, len(buffer), socket.MSG_TRUNC):
            total += size
            if time.monotonic() - reported > REPORT_INTERVAL:
                reported = time.monotonic()
                client.sendall(total.to_bytes(8, "big"))


def answer(client: socket.socket) -> None:
    """Answer requests, which may be pipelined, until the client disconnects."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, suppress(OSError), client.makefile("rb") as requests:
        while len(size := requests.read(4)) == 4:
            client.sendall(b"x" * int.from_bytes(size, "big"))


def any_of_them(listener: socket.socket) -> None:
    """Serve each client as it requests, in a thread of its own."""
    memory = block()

    def serve(client: socket.socket) -> None:
        with suppress(OSError):
            match client.recv(1):
                case b"b":
                    send(client, memory)
                case b"s":
                    swallow(client)
                case b"a":
                    answer(client)
        client.close()

    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client,), daemon=True).start()


KINDS = {"bulk": bulk, "greet": greet, "any": any_of_them}

if __name__ == "__main__":
    kind, host = (*sys.argv[1:], LOOPBACK)[:2]
    with socket.create_server((host, 0), backlog=BACKLOG) as server:
        print(server.getsockname()[1], flush=True)
        KINDS[kind](server)
