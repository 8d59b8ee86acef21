"""A name server for TXT records, and for dynamic updates of them (RFC 2136), whose signatures it verifies."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.system import lacking

try:
    import dns.exception
    import dns.message
    import dns.name
    import dns.opcode
    import dns.rcode
    import dns.rdatatype
    import dns.rrset
    import dns.tsigkeyring
except ImportError:
    lacking("dnspython is not installed (the extra tunneld[dns])")

SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA=="
ZONE = dns.name.from_text("example.org.")
KEYS = dns.tsigkeyring.from_text({"tunneld.": SECRET})


class NameServer:
    """The primary server of example.org: `records` are the TXT records that it has."""

    def __init__(self) -> None:
        self.records: set[tuple[str, str]] = set()
        self.refuses = False
        self.is_silent = False
        self.asked: list[str] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve)

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def _serve(self) -> None:
        while True:
            wire, peer = self.socket.recvfrom(4096)
            if not wire:
                return
            try:
                message = dns.message.from_wire(wire, keyring=KEYS)
            except dns.exception.DNSException:  # not signed with the key
                answer = dns.message.make_response(dns.message.from_wire(wire, keyring=False))
                answer.set_rcode(dns.rcode.NOTAUTH)
            else:
                answer = self._answer(message)
            if not self.is_silent:
                self.socket.sendto(answer.to_wire(), peer)

    def _answer(self, message: dns.message.Message) -> dns.message.Message:
        answer = dns.message.make_response(message)
        if message.opcode() != dns.opcode.UPDATE:
            self._answer_query(message, answer)
        elif self.refuses:
            answer.set_rcode(dns.rcode.REFUSED)
        else:
            updates: Any = message
            for rrset in updates.update:
                for each in rrset:
                    record = (str(rrset.name), each.to_text().strip('"'))
                    (self.records.discard if rrset.deleting else self.records.add)(record)
        return answer

    def _answer_query(self, message: dns.message.Message, answer: dns.message.Message) -> None:
        name, kind = message.question[0].name, message.question[0].rdtype
        if kind == dns.rdatatype.TXT:
            self.asked.append(str(name))
            texts = [f'"{text}"' for owner, text in sorted(self.records) if owner == str(name)]
            if self.refuses:
                answer.set_rcode(dns.rcode.SERVFAIL)
            elif texts:
                answer.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *texts))
            else:
                answer.set_rcode(dns.rcode.NXDOMAIN)
        elif name == ZONE:
            text = "ns.example.org. root.example.org. 1 2 3 4 5"
            answer.answer.append(dns.rrset.from_text(ZONE, 60, "IN", "SOA", text))


@contextmanager
def serving_names() -> Iterator[NameServer]:
    """Run one."""
    server = NameServer()
    server.thread.start()
    try:
        yield server
    finally:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", server.port))
        server.thread.join()
        server.socket.close()
