"""The hidden servers of the benchmark that are not nginx, a process each: `python -m benchmarks.hidden KIND [HOST]`.

`bulk` sends to whoever connects, as fast as the connection takes it; `greet` says one octet and then holds the
connection. `any` does what the first octet says: b is bulk, s reads and tells how much that was until now, a answers
each request, a number of octets in four octets, with so many. Each prints its port and runs until it is ended.
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
BLOCK = 4 << 20  # octets sent at once, from the page cache: no copy, so the sender is no bottleneck
BACKLOG = 4096
TELL = 0.02  # seconds between two totals


def bulk(listener: socket.socket) -> None:
    """Send to everybody, a thread each."""
    memory = block()
    while True:
        client, _ = listener.accept()
        threading.Thread(target=send, args=(client, memory), daemon=True).start()


def block() -> int:
    """A descriptor of what is sent."""
    memory = os.memfd_create("bulk")
    os.write(memory, os.urandom(BLOCK))
    return memory


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


def swallow(client: socket.socket) -> None:
    """Read until the client has gone; tell it the total, in eight octets, now and then."""
    buffer, total, told = bytearray(1 << 20), 0, time.monotonic()
    with client, suppress(OSError):
        while octets := client.recv_into(buffer, len(buffer), socket.MSG_TRUNC):
            total += octets
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                client.sendall(total.to_bytes(8, "big"))


def answer(client: socket.socket) -> None:
    """Answer until the client has gone; requests may be sent ahead."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, suppress(OSError), client.makefile("rb") as requests:
        while len(size := requests.read(4)) == 4:
            client.sendall(b"x" * int.from_bytes(size, "big"))


def any_of_them(listener: socket.socket) -> None:
    """Do what each asks for, a thread each."""
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
