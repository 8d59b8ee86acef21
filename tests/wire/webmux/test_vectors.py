"""Every example of vectors.txt, encoded and decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.wire.webmux.helpers import Pair, Seen, merged, receive, take_output
from tunneld.wire.webmux.events import (
    Accepted,
    AtomInterned,
    CreditAdded,
    DefaultCreditSet,
    EndpointDefined,
    Finished,
    MssSet,
    Opened,
    Reset,
)
from tunneld.wire.webmux.header import UNLIMITED, pack_header
from tunneld.wire.webmux.mux import Mux

NAMES = ("name", "from", "hex", "decode", "note")


def read_vectors() -> dict[str, bytes]:
    blocks = Path(__file__).with_name("vectors.txt").read_text().split("\n\n")
    vectors = {}
    for block in blocks[1:]:
        fields = dict(line.split(": ", 1) for line in block.strip().splitlines())
        assert set(fields) <= set(NAMES)
        vectors[fields["name"]] = bytes.fromhex(fields["hex"])
    return vectors


VECTORS = read_vectors()


class Case(NamedTuple):
    prepare: Callable[[Pair], object]
    send: Callable[[Mux], object]
    items: list[Seen]
    by_acceptor: bool = False
    rest: bytes = b""  # payload that the file omits


def nothing(_: Pair) -> None:
    pass


def opened(pair: Pair) -> None:
    assert pair.opened() == 2


def syn_sent(pair: Pair) -> None:
    pair.initiator.open(80)
    pair.settle()


def third(pair: Pair) -> None:
    pair.opened()
    pair.opened()


def last_and_unlimited(pair: Pair) -> None:
    pair.acceptor.set_default_credit(UNLIMITED)
    pair.settle()
    for _ in range(127):
        pair.opened()


def atom_known(pair: Pair) -> None:
    pair.initiator.intern_atom(0, "http:")
    pair.settle()


def one_way(mux: Mux) -> None:
    session = mux.open(80)
    mux.send(session, b"hello", push=True)
    mux.finish(session)


def advertise(mux: Mux) -> None:
    mux.define_endpoint(mux.intern_atom(0, "tcp://tunnel.example:8011"))


def raw(mux: Mux, data: bytes) -> None:
    mux.outgoing += data


CASES = {
    "d01-syn-tcp80": Case(nothing, lambda mux: mux.open(80), [Opened(2, 80)]),
    "d02-syn-by-acceptor": Case(nothing, lambda mux: mux.open(7), [Opened(3, 7)], by_acceptor=True),
    "d03-syn-reply": Case(syn_sent, lambda mux: mux.accept(2), [Accepted(2)], by_acceptor=True),
    "d04-fin-reply": Case(syn_sent, lambda mux: mux.finish(2), [Accepted(2), Finished(2)], by_acceptor=True),
    "d05-rst-bare": Case(opened, lambda mux: mux.reset(2), [Reset(2, "", "")]),
    "d07-data": Case(opened, lambda mux: mux.send(2, b"abcd"), [(2, b"abcd", False)]),
    "d08-data-push-pad3": Case(opened, lambda mux: mux.send(2, b"hello", push=True), [(2, b"hello", True)]),
    "d11-fin": Case(opened, lambda mux: mux.finish(2), [Finished(2)]),
    "d14-max-short-length": Case(
        last_and_unlimited,
        lambda mux: raw(mux, pack_header(254 << 24, 0x3FFFF)),
        [(254, bytes(0x3FFFF), False)],
        rest=bytes(0x40000),
    ),
    "d15-internatom0": Case(nothing, lambda mux: mux.intern_atom(0, "http:"), [AtomInterned(0x20000, "http:")]),
    "d16-internatom1": Case(
        nothing, lambda mux: mux.intern_atom(1, "urn:x:tunnel"), [AtomInterned(0x20001, "urn:x:tunnel")]
    ),
    "d18-syn-server-assigned": Case(third, lambda mux: mux.open(0x30000), [Opened(6, 0x30000)]),
    "d19-defineendpoint-atom": Case(
        atom_known, lambda mux: mux.define_endpoint(0x20000), [EndpointDefined(0x20000, "http:")]
    ),
    "d20-setmss": Case(nothing, lambda mux: mux.set_mss(1460), [MssSet(1460)]),
    "d22-addcredit": Case(opened, lambda mux: mux.grant(2, 16384), [CreditAdded(2, 32768)]),
    "d23-addcredit-max-short": Case(opened, lambda mux: mux.grant(2, 262143), [CreditAdded(2, 262143 + 16384)]),
    "d25-addcredit-unlimited": Case(opened, lambda mux: mux.grant(2, UNLIMITED), [CreditAdded(2, UNLIMITED + 16384)]),
    "d26-setdefaultcredit": Case(nothing, lambda mux: mux.set_default_credit(32768), [DefaultCreditSet(32768)]),
    "d28-noop-payload": Case(nothing, lambda mux: mux.noop(b"xxx"), []),
    "d30-reserved-session": Case(nothing, lambda mux: raw(mux, pack_header(1 << 24, 4) + bytes(4)), []),
    "d32-exchange-initiator": Case(nothing, one_way, [Opened(2, 80), (2, b"hello", True), Finished(2)]),
    "d34-advertise-endpoint": Case(
        nothing,
        advertise,
        [
            AtomInterned(0x20000, "tcp://tunnel.example:8011"),
            EndpointDefined(0x20000, "tcp://tunnel.example:8011"),
        ],
    ),
}


def test_every_vector_has_a_case() -> None:
    assert set(CASES) == set(VECTORS)


@pytest.mark.parametrize("name", VECTORS)
def test_vector_is_encoded(name: str) -> None:
    case, pair = CASES[name], Pair()
    case.prepare(pair)
    mux = pair.acceptor if case.by_acceptor else pair.initiator
    case.send(mux)
    assert take_output(mux).hex() == VECTORS[name].hex()


@pytest.mark.parametrize("name", VECTORS)
def test_vector_is_decoded(name: str) -> None:
    case, pair = CASES[name], Pair()
    case.prepare(pair)
    mux = pair.initiator if case.by_acceptor else pair.acceptor
    assert merged(receive(mux, VECTORS[name] + case.rest)) == case.items
    assert not mux.outgoing
