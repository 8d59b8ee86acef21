"""Find the bytes that an upload loses: `python -m benchmarks.witness serve PORT FOLDER`, `... upload HOST PORT NAME`.

The server answers a probe (the byte p) with one byte. It stores uploads (the byte u, a name, a newline, data) in a
folder, and acknowledges the bytes written to the file. The visitor uploads a stream with known content, at most
`AHEAD` bytes ahead of the acknowledgement, until it is cut or terminated, and prints the result as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

BLOCK = 4096
PAUSE = 0.005
"""Seconds between two blocks: 6.5 Mbit/s, a good uplink of a home."""
AHEAD = 1 << 20
"""Bytes that may be unacknowledged."""


def block(number: int) -> bytes:
    """Return one block of the stream."""
    return hashlib.sha256(number.to_bytes(8, "big")).digest() * (BLOCK // 32)


def proven(path: Path) -> int:
    """Return the number of bytes of an upload that arrived; -1 if one of them is wrong."""
    content = path.read_bytes() if path.exists() else b""
    numbers = range((len(content) + BLOCK - 1) // BLOCK)
    return len(content) if b"".join(map(block, numbers)).startswith(content) else -1


def serve(port: int, folder: Path) -> None:
    """Serve until killed."""

    def keep(client: socket.socket) -> None:
        with client, suppress(OSError), client.makefile("rb", buffering=0) as request:
            if request.read(1) == b"p":
                client.sendall(b"P")
                return
            name = b""
            while not name.endswith(b"\n"):
                name += request.read(1) or b"\n"
            total, path = 0, folder / name.decode().strip()
            with path.open("wb", buffering=0) as file:
                while data := client.recv(65536):
                    total += file.write(data)
                    client.sendall(total.to_bytes(8, "big"))

    with socket.create_server(("127.0.0.1", port), backlog=1000) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=keep, args=(client,), daemon=True).start()


class Upload:
    """One upload; `acknowledged` and `sent` are in bytes."""

    def __init__(self) -> None:
        self.acknowledged = self.sent = 0
        self.end = "went on"
        self.ended = threading.Event()

    def receive(self, client: socket.socket) -> None:
        """Receive acknowledgements until the connection ends."""
        try:
            with client.makefile("rb") as totals:
                while len(total := totals.read(8)) == 8:
                    self.acknowledged = int.from_bytes(total, "big")
            self.finish("eof")
        except OSError:
            self.finish("reset")

    def finish(self, how: str) -> None:
        """Record how the upload ended. Only the first call counts."""
        if not self.ended.is_set():
            self.end = how
            self.ended.set()

    def send(self, client: socket.socket, name: str) -> None:
        """Send until the upload ends."""
        try:
            client.sendall(b"u" + name.encode() + b"\n")
            number = 0
            while not self.ended.wait(PAUSE):
                if self.sent - self.acknowledged < AHEAD:
                    client.sendall(block(number))
                    self.sent += BLOCK
                    number += 1
        except OSError:
            self.finish("reset")


def upload(host: str, port: int, name: str) -> None:
    """Upload until the connection is cut or SIGTERM arrives."""
    going = Upload()
    with socket.create_connection((host, port), timeout=None) as client:
        signal.signal(signal.SIGTERM, lambda *_: going.finish("went on"))
        threading.Thread(target=going.receive, args=(client,), daemon=True).start()
        threading.Thread(target=going.send, args=(client, name), daemon=True).start()
        print("uploads", flush=True)
        going.ended.wait()
        figures = {"end": going.end, "sent": going.sent, "acknowledged": going.acknowledged, "at": time.monotonic()}
    print(json.dumps(figures), flush=True)
    os._exit(0)  # without waiting for threads that are blocked on a dead peer


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", port, folder]:
            serve(int(port), Path(folder))
        case ["upload", host, port, name]:
            upload(host, int(port), name)
