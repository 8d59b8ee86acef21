"""The test vectors of tunneld-control(7), section EGTP: in vectors.txt, on the page, and what the code makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunneld.tls.identity import Identity
from tunneld.wire.egtp import streams
from tunneld.wire.egtp.attaching import AttachRequest
from tunneld.wire.egtp.envelope import encode_hello, encode_records, encode_reject, encode_streams
from tunneld.wire.egtp.fast import encode_for_you, encode_received
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES

PAGE = Path(__file__).parents[2] / "man" / "tunneld-control.7"
VECTORS = dict(
    line.split(" = ")
    for line in Path(__file__).with_name("vectors.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
A, N, R, S = (letter * 20 for letter in (b"A", b"N", b"R", b"S"))


def frames() -> dict[str, bytes]:
    """One frame of each kind, as the codec sends it."""
    made: dict[str, bytes] = {}
    relay = streams.Streams(initiator=False)

    def note(name: str) -> None:
        made[name] = bytes(relay.outgoing)
        relay.outgoing.clear()

    stream = relay.open(b"80")
    note("open")
    relay.send(stream, memoryview(b"hello"))
    note("data")
    relay.grant(2, 16384)
    note("credit")
    relay.finish(2)
    note("eof")
    relay.reset(2, "gone")
    note("reset")
    relay.retire()
    note("retire")
    relay.leave("bye")
    note("goodbye")
    return made


def expected() -> dict[str, str]:
    """All vectors, as the code makes them."""
    made = frames()
    envelope = encode_streams(7, made["open"] + made["data"])
    attach = AttachRequest(A, resumed=True, received=3).encode()
    octets = {
        "hello": encode_hello(R, S, b"CERTIFICATE"),
        "records": encode_records(S, 1, b"RECORDS"),
        "reject": encode_reject(S, N, "no"),
        **made,
        "streams": envelope,
        "request": encode_for_you(R, N, envelope),
        "response": encode_received(N),
        "attach": MojoRequest(ARE_THERE_MESSAGES, R, N, attach).encode(),
    }
    ids = {f"id of seed {byte:02x}": str(Identity.from_seed(bytes([byte]) * 32).id) for byte in (0, 1)}
    return ids | {name: value.hex() for name, value in octets.items()}


def on_the_page() -> dict[str, str]:
    """The vectors of the page; a long one goes on in indented lines."""
    text = PAGE.read_text().partition(".Ss Test vectors\n")[2].partition(".Sh ")[0]
    block = text.partition(".Bd -literal\n")[2].partition("\n.Ed")[0]
    joined = re.sub(r"\n +", "", block)
    return dict(re.split(r" += ?", line, maxsplit=1) for line in joined.splitlines())


def test_the_file_has_every_vector_once() -> None:
    assert VECTORS.keys() == expected().keys()


@pytest.mark.parametrize("name", expected())
def test_the_code_makes_what_the_vectors_say(name: str) -> None:
    assert expected()[name] == VECTORS[name]


def test_the_page_has_the_same_vectors() -> None:
    assert on_the_page() == VECTORS
