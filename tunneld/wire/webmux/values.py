"""What stands inside WebMUX messages: texts, amounts of credit, protocol ids. Pure."""

from __future__ import annotations

from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.header import MAX_LONG
from tunneld.wire.webmux.limits import MAX_PROTOCOL, MAX_TEXT, UNLIMITED


def credit_to_wire(octets: int) -> int:
    """The field of AddCredit and SetDefaultCredit: 0 is unlimited. Raises `LocalProtocolError` for other oddities."""
    if octets == UNLIMITED:
        return 0
    if not 0 < octets <= MAX_LONG:
        raise LocalProtocolError(f"credit of {octets} octets cannot be said; give 1 to {MAX_LONG} or UNLIMITED")
    return octets


def credit_from_wire(value: int) -> int:
    """Octets of credit that the field means."""
    return value or UNLIMITED


def check_protocol(protocol: int) -> None:
    """Raises `LocalProtocolError` for what is no protocol id."""
    if not 0 <= protocol <= MAX_PROTOCOL:
        raise LocalProtocolError(f"protocol id {protocol:#x} is beyond {MAX_PROTOCOL:#x}")


def atom_to_wire(text: str) -> bytes:
    """The payload of InternAtom. Raises `LocalProtocolError` when it would be longer than `MAX_TEXT` octets."""
    payload = text.encode(errors="replace")
    if len(payload) > MAX_TEXT:
        raise LocalProtocolError(f"atom of {len(payload)} octets is longer than {MAX_TEXT}")
    return payload


def reason_to_wire(uri: str, text: str) -> bytes:
    """The payload of RST: URI, NUL, explanation, NUL, or nothing at all. Cut to `MAX_TEXT` octets; a NUL inside becomes
    a blank.
    """
    if not uri and not text:
        return b""
    payload = "\0".join(part.replace("\0", " ") for part in (uri, text)).encode(errors="replace")
    return payload[: MAX_TEXT - 1].decode(errors="ignore").encode() + b"\0"


def reason_from_wire(payload: bytes) -> tuple[str, str]:
    """URI and explanation in the payload of RST, as far as they are there and UTF-8."""
    uri, _, rest = payload.decode(errors="replace").partition("\0")
    return uri, rest.partition("\0")[0]
