"""A name server for dynamic updates (RFC 2136) that verifies their signatures."""

from __future__ import annotations

import socket
import threading
from typing import Any

from tests.support.system import lacking

try:
    import dns.exception
    import dns.message
    import dns.name
    import dns.opcode
    import dns.rcode
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
            self.socket.sendto(answer.to_wire(), peer)

    def _answer(self, message: dns.message.Message) -> dns.message.Message:
        answer = dns.message.make_response(message)
        if message.opcode() != dns.opcode.UPDATE:
            if message.question[0].name == ZONE:
                text = "ns.example.org. root.example.org. 1 2 3 4 5"
                answer.answer.append(dns.rrset.from_text(ZONE, 60, "IN", "SOA", text))
        elif self.refuses:
            answer.set_rcode(dns.rcode.REFUSED)
        else:
            updates: Any = message
            for rrset in updates.update:
                for each in rrset:
                    record = (str(rrset.name), each.to_text().strip('"'))
                    (self.records.discard if rrset.deleting else self.records.add)(record)
        return answer
