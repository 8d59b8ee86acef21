#!/usr/bin/env python3
"""A small agent for a tunneld relay, written from tunneld-control(7) and the WebMUX draft alone.

    agent.py RELAY:PORT LOCAL_PORT [--ca FILE] [--credential NAME]       the secret is $TUNNEL_SECRET

It opens a tunnel, prints its public address, connects visitors to LOCAL_PORT until it is stopped, and reconnects
after a loss. It is an example, kept short: two threads per visitor, no limits, no health checks.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import os
import secrets
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

CONTROL, SYN, FIN, RST, LONG = 0x800000, 0x400000, 0x200000, 0x100000, 0x040000
INTERN_ATOM, DEFINE_ENDPOINT, SET_MSS, ADD_CREDIT, SET_DEFAULT_CREDIT = range(5)
ATOM = 0x20000
PING, PING_SESSION = 0, 2
FRAGMENT = 16384
WINDOW = 65536


# The control port: a protocol of lines


class Relay:
    """A control connection."""

    def __init__(self, where: str, tls: ssl.SSLContext | None, credential: str | None) -> None:
        self.host, _, port = where.rpartition(":")
        self.tls = tls
        connection = socket.create_connection((self.host, int(port)), timeout=10)
        self.connection = tls.wrap_socket(connection, server_hostname=self.host) if tls else connection
        self.lines = self.connection.makefile("r", encoding="utf-8", newline="\n")
        greeting = self.lines.readline()
        if not greeting.startswith("OK tunneld "):
            raise OSError(f"this is no tunneld, or it is full: {greeting.strip()}")
        if "auth=scram-sha-256" in greeting.split():
            self.authenticate(credential or "", os.environ.get("TUNNEL_SECRET", ""))

    def ask(self, request: str) -> str:
        """Send a request; return the text of the final line, without the items before it. Failure raises OSError."""
        self.connection.sendall(f"{request}\n".encode())
        while (line := self.lines.readline()).startswith("*"):
            pass
        verdict, _, text = line.rstrip("\r\n").partition(" ")
        if verdict != "OK":
            raise OSError(text or "the relay hung up")
        return text

    def authenticate(self, name: str, secret: str) -> None:
        """Log in with SCRAM-SHA-256 (RFC 5802, RFC 7677)."""

        def step(words: str, message: str) -> str:
            answer = self.ask(f"auth {words}{base64.b64encode(message.encode()).decode()}")
            return base64.b64decode(answer + "=" * (-len(answer) % 4)).decode()

        def mac(key: bytes, message: bytes) -> bytes:
            return hmac.digest(key, message, "sha256")

        first = f"n={name.replace('=', '=3D').replace(',', '=2C')},r={secrets.token_hex(16)}"
        server = step("SCRAM-SHA-256 ", f"n,,{first}")
        fields = dict(part.split("=", 1) for part in server.split(","))
        salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), base64.b64decode(fields["s"]), int(fields["i"]))
        last = f"c=biws,r={fields['r']}"
        signed = f"{first},{server},{last}".encode()
        key = mac(salted, b"Client Key")
        signature = mac(hashlib.sha256(key).digest(), signed)
        proof = base64.b64encode(bytes(a ^ b for a, b in zip(key, signature, strict=True))).decode()
        proved = step("", f"{last},p={proof}")
        expected = base64.b64encode(mac(mac(salted, b"Server Key"), signed)).decode()
        if proved != f"v={expected}":
            raise OSError("the relay does not know the secret")


# The connection that carries all visitors: WebMUX


class Carrier:
    """A connection to the server URI of a tunnel, and its visitors by session number."""

    def __init__(self, uri: str, relay: Relay, local_port: int) -> None:
        where = urlsplit(uri)
        connection = socket.create_connection((where.hostname or "", where.port or 0), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if where.scheme == "webmuxs":
            assert relay.tls is not None
            connection = relay.tls.wrap_socket(connection, server_hostname=relay.host)
        connection.settimeout(None)
        self.connection = connection
        self.local_port = local_port
        self.sending = threading.Lock()
        self.visitors: dict[int, Visitor] = {}
        self.default_credit = 16384  # the default of the draft, until the relay sets another
        self.taken = False
        name = uri.encode()
        self.say(0, CONTROL | INTERN_ATOM << 19, len(name), name)
        self.say(0, CONTROL | DEFINE_ENDPOINT << 19, ATOM)
        self.say(0, CONTROL | SET_DEFAULT_CREDIT << 19, WINDOW)
        self.say(PING_SESSION, SYN, PING)

    def say(self, session: int, flags: int, value: int, payload: bytes = b"") -> None:
        """Send one message, with the payload padded to a multiple of four bytes."""
        word = struct.pack(">I", session << 24 | flags | value)
        with self.sending:
            self.connection.sendall(word + payload + bytes(-len(payload) % 4))

    def serve(self) -> None:
        """Handle messages until the connection ends, then drop its visitors."""
        try:
            with self.connection.makefile("rb", buffering=1 << 16) as said:
                while len(header := said.read(4)) == 4:
                    (word,) = struct.unpack(">I", header)
                    value = word & 0x3FFFF
                    if word & LONG:
                        (value,) = struct.unpack(">I", said.read(4))
                    self.hear(word, value, said.read)
        except OSError:
            pass
        finally:
            for visitor in list(self.visitors.values()):
                visitor.drop()
            self.connection.close()

    def hear(self, word: int, value: int, read: Callable[[int], bytes]) -> None:
        """Handle one message; `read(n)` returns n bytes of its payload."""
        session = word >> 24
        if word & CONTROL:
            code = word >> 19 & 15
            if code == ADD_CREDIT and session in self.visitors:
                self.visitors[session].add_credit(value)
            elif code == SET_DEFAULT_CREDIT:
                self.default_credit = value
            elif code not in (DEFINE_ENDPOINT, SET_MSS, ADD_CREDIT):
                read(value + -value % 4)  # every other control message has a payload
            return
        if word & SYN:
            if session == PING_SESSION:
                self.taken = True
            elif value == PING:
                self.say(session, RST, 0)
            else:
                self.visitors[session] = Visitor(self, session, value)
            return
        data = read(value + -value % 4)[:value]
        if session == PING_SESSION:  # any answer to the ping will do; usually it is this RST
            self.taken = True
        elif (visitor := self.visitors.get(session)) is not None:
            if word & RST:
                visitor.drop()
            else:
                visitor.hear(data, end=bool(word & FIN))


class Visitor:
    """One session of a carrier and its connection to the local server, with a thread per direction."""

    def __init__(self, carrier: Carrier, session: int, protocol: int) -> None:
        self.carrier, self.session = carrier, session
        self.credit = carrier.default_credit
        self.changed = threading.Condition()
        self.heard: list[bytes] = []
        self.over = False
        self.halves = 2  # directions that are still open
        self.server: socket.socket | None = None
        threading.Thread(target=self.connect, args=(protocol,), daemon=True).start()

    def connect(self, protocol: int) -> None:
        """Connect to the local server, accept the session, then relay."""
        try:
            self.server = socket.create_connection(("127.0.0.1", self.carrier.local_port), timeout=10)
            self.server.settimeout(None)
        except OSError:
            self.reset()
            return
        if self.over:  # reset before it was accepted
            self.server.close()
            return
        self.carrier.say(self.session, SYN, protocol)
        threading.Thread(target=self.to_server, daemon=True).start()
        self.to_visitor()

    def hear(self, data: bytes, *, end: bool) -> None:
        """Queue bytes from the visitor. The queue is bounded by the credit that was granted."""
        with self.changed:
            self.heard += [data] * bool(data) + [b""] * end
            self.changed.notify_all()

    def add_credit(self, octets: int) -> None:
        """The relay accepts this many bytes more; zero means without limit."""
        with self.changed:
            self.credit = self.credit + octets if octets else 1 << 62
            self.changed.notify_all()

    def to_server(self) -> None:
        """Copy from the visitor to the server, and grant credit for what the server has taken."""
        assert self.server is not None
        try:
            while True:
                with self.changed:
                    while not self.heard and not self.over:
                        self.changed.wait()
                    if self.over:
                        return
                    data = self.heard.pop(0)
                if not data:
                    self.server.shutdown(socket.SHUT_WR)
                    self.end_half()
                    return
                self.server.sendall(data)
                self.carrier.say(self.session, CONTROL | ADD_CREDIT << 19, len(data))
        except OSError:
            self.reset()

    def to_visitor(self) -> None:
        """Copy from the server to the visitor, as far as there is credit."""
        assert self.server is not None
        try:
            while True:
                with self.changed:
                    while not self.credit and not self.over:
                        self.changed.wait()
                    if self.over:
                        return
                    most = min(self.credit, FRAGMENT)
                data = self.server.recv(most)
                if not data:
                    self.carrier.say(self.session, FIN, 0)
                    self.end_half()
                    return
                with self.changed:
                    self.credit -= len(data)
                self.carrier.say(self.session, 0, len(data), data)
        except OSError:
            self.reset()

    def end_half(self) -> None:
        """One direction has ended; the other may continue."""
        with self.changed:
            self.halves -= 1
            done = not self.halves
        if done:
            self.drop()

    def reset(self) -> None:
        """End both directions and tell the relay."""
        if not self.over:
            with suppress(OSError):
                self.carrier.say(self.session, RST, 0)
            self.drop()

    def drop(self) -> None:
        """Close the local connection and free the session number for the next visitor."""
        with self.changed:
            self.over = True
            self.changed.notify_all()
        if self.carrier.visitors.get(self.session) is self:
            del self.carrier.visitors[self.session]
        if self.server is not None:
            with suppress(OSError):
                self.server.shutdown(socket.SHUT_RDWR)  # wakes the threads that read or write there
            self.server.close()


def main() -> None:
    """Open a tunnel and serve it until stopped; after a loss reconnect at the same address."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("relay", metavar="RELAY:PORT")
    parser.add_argument("local_port", metavar="LOCAL_PORT", type=int)
    parser.add_argument("--ca", metavar="FILE", help="the control port speaks TLS; whom to believe")
    parser.add_argument("--credential", metavar="NAME")
    options = parser.parse_args()
    tls = ssl.create_default_context(cafile=options.ca) if options.ca else None
    name, port = f"agent-{secrets.token_hex(4)}", ""
    while True:
        try:
            relay = Relay(options.relay, tls, options.credential)
            uri = relay.ask(f"openTunnel webmux persist=yes name={name}{port}")
            address = relay.ask(f"getTunnelAddress {uri}")
            print(address, flush=True)
            port = f" client_port={urlsplit(address).port}"
            taken = True
            while taken:
                carrier = Carrier(uri, relay, options.local_port)
                carrier.serve()
                taken = carrier.taken  # if not, the relay no longer knows the tunnel: open it again
        except OSError as error:
            print(f"{options.relay}: {error}", file=sys.stderr)
        time.sleep(1)


if __name__ == "__main__":
    main()
