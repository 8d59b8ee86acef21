"""dns-01 by dynamic updates of the zone (RFC 2136), signed with a shared key (TSIG, RFC 8945)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.tsigkeyring
import dns.update
from acme.challenges import KeyAuthorizationChallenge

from tunneld.acme.challenges import record_name
from tunneld.errors import UsageError, reason_of

TTL = 60
"""Seconds for which resolvers may keep the record: the authority asks the zone's own servers."""


@dataclass(frozen=True, slots=True)
class DnsUpdate:
    """See the description of this module. Implements `Responder`."""

    server: tuple[str, int]
    key_name: str
    key_secret_file: Path
    algorithm: str
    timeout: float  # seconds, of each message
    propagation: float  # seconds until all servers of the zone have the record
    sleep: Callable[[float], None] = time.sleep

    def present(self, name: str, _challenge: KeyAuthorizationChallenge, validation: str) -> None:
        """See `Responder`."""
        self._update(name, lambda update, record: update.add(record, TTL, "TXT", f'"{validation}"'))
        self.sleep(self.propagation)

    def remove(self, name: str, _challenge: KeyAuthorizationChallenge, validation: str) -> None:
        """See `Responder`. A record that stays does no harm."""
        with suppress(UsageError):
            self._update(name, lambda update, record: update.delete(record, "TXT", f'"{validation}"'))

    def _update(self, name: str, change: Callable[[dns.update.UpdateMessage, dns.name.Name], Any]) -> None:
        record = dns.name.from_text(record_name(name))
        try:
            update = dns.update.UpdateMessage(
                self._zone(record), keyring=self._keyring(), keyalgorithm=dns.name.from_text(self.algorithm)
            )
            change(update, record)
            answer = self._ask(update)
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise UsageError(
                f"could not update {record} at {self.server[0]} (acme.rfc2136): {_reason(error)}"
            ) from None
        if answer.rcode() != dns.rcode.NOERROR:
            refused = dns.rcode.to_text(answer.rcode())
            raise UsageError(f"could not update {record} at {self.server[0]} (acme.rfc2136): {refused}")

    def _zone(self, record: dns.name.Name) -> dns.name.Name:
        """The zone of a record: the nearest name above with a SOA record at the server."""
        zone = record
        while zone != dns.name.root:
            zone = zone.parent()
            answer = self._ask(dns.message.make_query(zone, dns.rdatatype.SOA))
            if any(each.rdtype == dns.rdatatype.SOA and each.name == zone for each in answer.answer):
                return zone
        raise ValueError("it has no zone with this name")

    def _keyring(self) -> dict[dns.name.Name, dns.tsig.Key]:
        secret = self.key_secret_file.read_text().strip()
        return dns.tsigkeyring.from_text({self.key_name: secret})

    def _ask(self, message: dns.message.Message) -> dns.message.Message:
        host, port = self.server
        return dns.query.udp_with_fallback(message, _address(host), self.timeout, port)[0]


def _address(host: str) -> str:
    """An address of a host, since dnspython takes nothing else. Raises OSError."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][4][0])


def _reason(error: BaseException) -> str:
    return reason_of(error) if isinstance(error, OSError) else str(error) or type(error).__name__
