"""The fields of requests and responses as they pass the relay. Pure.

The hidden server learns from the relay, and from the relay alone, where a request comes from:

    X-Forwarded-For      the visitor's address
    X-Forwarded-Proto    `http` or `https`: how it reached the relay
    X-Forwarded-Host     the host that it asked for, with the port if there was one
    X-Request-Id         names the request in the logs of both sides

A visitor could write the same fields, or spellings of them that a server takes for the same (`X_Forwarded_For` in CGI
and WSGI), so all of these are removed first. A trusted proxy in front of the relay is believed: its fields stay, and
the relay adds to X-Forwarded-For only.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tunneld.net.accept import unmap_address
from tunneld.net.endpoint import Peer
from tunneld.policy.networks import NetworkSet, read_address
from tunneld.wire.http1 import Fields, RequestHead, ResponseHead, forwarded_fields

ORIGIN_FIELDS = frozenset(
    {
        *(b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port"),
        *(b"x-forwarded-server", b"x-forwarded-ssl", b"x-forwarded-prefix", b"x-real-ip", b"x-client-ip", b"via"),
        *(b"true-client-ip", b"x-cluster-client-ip", b"x-request-id"),
        *(b"x-original-url", b"x-rewrite-url", b"x-original-host"),
    }
)
"""Fields by which servers learn of the connection in front of a proxy. `Via` names proxies, and would tell the hidden
server nothing true; the URL fields make some frameworks answer for another path than the one that was checked here.
"""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=@-]{1,128}")
_REQUEST_ID_FIELD = frozenset((b"x-request-id",))
_random = random.Random()

FieldLines = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)  # a frozen one takes four times as long to make
class Origin:
    """Where a connection came from; nothing changes it."""

    peer: Peer  # a visitor, or a proxy in front of the relay
    scheme: bytes  # b"http" or b"https"
    reached: Peer  # the address of the relay that it connected to
    proxies: NetworkSet | None = None  # the operator trusts what these say; None: the peer is none of them

    @property
    def address(self) -> str:
        """The peer's address without its port."""
        return str(self.peer[0])

    @property
    def is_trusted(self) -> bool:
        """Whether the peer is a proxy that the operator trusts."""
        return self.proxies is not None

    def is_secure(self, head: RequestHead) -> bool:
        """Whether the visitor sent a request in TLS, to the relay or to a trusted proxy."""
        if self.proxies is not None:
            said = [value.lower() for name, value in head.fields if name.lower() == b"x-forwarded-proto"]
            if said:
                return said[-1] == b"https"
        return self.scheme == b"https"

    def client(self, head: RequestHead) -> Peer:
        """The address of the visitor that made a request: the peer, or behind trusted proxies the last address in
        X-Forwarded-For that is none of theirs.
        """
        if self.proxies is None:
            return self.peer
        chain = b",".join(value for name, value in head.fields if name.lower() == b"x-forwarded-for").decode("latin-1")
        client = self.peer
        for text in reversed(chain.split(",")):
            host = str(unmap_address((text.strip(), 0, 0, 0))[0])
            try:
                address = read_address(host)
            except ValueError:
                break
            client = (host, 0)
            if address not in self.proxies:
                break
        return client


@dataclass(frozen=True, slots=True)
class HostRewrite:
    """The host that the hidden server expects in place of the public one: many development servers refuse others."""

    local: bytes  # such as b"localhost:8000"

    def request(self, name: bytes, value: bytes, public: bytes) -> bytes:
        """The value of Host, Origin or Referer for the hidden server; `public` is what the visitor asked for."""
        if name == b"host":
            return self.local
        for scheme in (b"https://", b"http://"):
            start = scheme + public
            if value == start or value.startswith(start + b"/"):
                return b"http://" + self.local + value[len(start) :]
        return value

    def response(self, name: bytes, value: bytes, origin: Origin, public: bytes) -> bytes:
        """The value of Location, Content-Location, Access-Control-Allow-Origin or Set-Cookie for the visitor."""
        if name == b"set-cookie":
            return self._cookie(value, public)
        for scheme in (b"http://", b"https://"):
            start = scheme + self.local
            if value == start or value.startswith((start + b"/", start + b"?")):
                return origin.scheme + b"://" + public + value[len(start) :]
        return value

    def _cookie(self, value: bytes, public: bytes) -> bytes:
        """A cookie for the local host becomes one for the public host alone: its domain is left out."""
        parts = value.split(b";")
        local = self.local.rpartition(b":")[0] or self.local
        kept = [part for part in parts if not _is_domain(part, local)]
        return b";".join(kept)


_REWRITTEN_IN_REQUESTS = frozenset((b"host", b"origin", b"referer"))
_REWRITTEN_IN_RESPONSES = frozenset((b"location", b"content-location", b"access-control-allow-origin", b"set-cookie"))


def given_id(head: RequestHead) -> bytes:
    """The id that a proxy in front or the visitor gave a request, if that is a plain word; otherwise empty."""
    for name, value in head.fields:
        if len(name) == 12 and name.lower() == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return b""


def new_id() -> bytes:
    """A new id for a request. It names the request, and protects nothing: it need not be hard to guess."""
    return b"%016x" % _random.getrandbits(64)


def request_fields(head: RequestHead, origin: Origin, rewrite: HostRewrite | None = None) -> Fields:
    """The fields of a request for the hidden server, but for X-Request-Id."""
    fields = [field for field in forwarded_fields(head.fields) if not _tells_origin(field[0], origin)]
    if rewrite is not None:
        fields = [
            (name, rewrite.request(lower, value, head.authority))
            if (lower := name.lower()) in _REWRITTEN_IN_REQUESTS
            else (name, value)
            for name, value in fields
        ]
    present = {name.lower() for name, _ in fields} if origin.is_trusted else ()
    address = origin.address.encode()
    if b"x-forwarded-for" in present:
        fields = _append_forwarded_for(fields, address)
    else:
        fields.append((b"X-Forwarded-For", address))
    if b"x-forwarded-proto" not in present:
        fields.append((b"X-Forwarded-Proto", origin.scheme))
    if b"x-forwarded-host" not in present:
        fields.append((b"X-Forwarded-Host", head.authority))
    return fields


def response_fields(
    response: ResponseHead, request: RequestHead, origin: Origin, rewrite: HostRewrite | None = None
) -> Fields:
    """The fields of a response for the visitor, but for X-Request-Id: that is the relay's."""
    fields = forwarded_fields(response.fields, _REQUEST_ID_FIELD)
    if rewrite is None:
        return fields
    return [
        (name, rewrite.response(lower, value, origin, request.authority))
        if (lower := name.lower()) in _REWRITTEN_IN_RESPONSES
        else (name, value)
        for name, value in fields
    ]


@dataclass(frozen=True, slots=True)
class Passage:
    """A request may pass; it and its response are changed on the way."""

    removed: frozenset[bytes] = frozenset()  # fields of the request, in lower case and with `-` in place of `_`
    added: FieldLines = ()  # to the request, behind that
    set_in_response: FieldLines = ()  # in place of fields with the same names
    added_to_response: FieldLines = ()

    def of_request(self, fields: Fields) -> Fields:
        """The fields for the hidden server."""
        kept = [field for field in fields if field[0].lower().replace(b"_", b"-") not in self.removed]
        return [*kept, *self.added]

    def of_response(self, fields: Fields) -> Fields:
        """The fields for the visitor."""
        names = {name.lower() for name, _ in self.set_in_response}
        kept = [field for field in fields if field[0].lower() not in names] if names else fields
        return [*kept, *self.set_in_response, *self.added_to_response]


def _tells_origin(name: bytes, origin: Origin) -> bool:
    lower = name.lower().replace(b"_", b"-")
    if lower not in ORIGIN_FIELDS:
        return False
    return not origin.is_trusted or b"_" in name or lower == b"x-request-id"


def _append_forwarded_for(fields: Fields, address: bytes) -> Fields:
    """One X-Forwarded-For with the addresses of all that were there, and the peer's own at the end."""
    chain = [value for name, value in fields if name.lower() == b"x-forwarded-for"]
    rest = [field for field in fields if field[0].lower() != b"x-forwarded-for"]
    return [*rest, (b"X-Forwarded-For", b", ".join([*chain, address]))]


def _is_domain(part: bytes, local: bytes) -> bool:
    name, _, value = part.partition(b"=")
    return name.strip().lower() == b"domain" and value.strip().lower().removeprefix(b".") == local.lower()
