"""The modern envelope between two nodes: who gets in, and what ends a session."""

from __future__ import annotations

import pytest

from tunneld.egtp.session import UNKNOWN_NODE, NodeSession
from tunneld.errors import NoSuchTunnelError, NotAllowedError, RemoteProtocolError
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity
from tunneld.wire.egtp.envelope import encode_hello, encode_records

RELAY, AGENT, OTHER = (Identity.from_seed(bytes([number]) * 32) for number in range(3))


def acceptor(identity: Identity = RELAY) -> NodeSession:
    return NodeSession.accept(lambda recipient: identity if recipient == identity.id.digest else None)


def exchange(one: NodeSession, other: NodeSession) -> None:
    """Pass envelopes to and fro until there are none."""
    while envelopes := [*one.take_outgoing()]:
        for envelope in envelopes:
            assert other.receive(memoryview(envelope)) == []
        one, other = other, one


def established() -> tuple[NodeSession, NodeSession]:
    agent, relay = NodeSession.initiate(AGENT, RELAY.id), acceptor()
    exchange(agent, relay)
    assert agent.established
    assert relay.established
    return agent, relay


def received(session: NodeSession, envelope: bytes) -> list[bytes]:
    return [bytes(message) for message in session.receive(memoryview(envelope))]


def sealed(session: NodeSession, message: bytes) -> bytes:
    return b"".join(session.seal(message))


def test_both_ends_know_whom_they_talk_to_and_messages_go_both_ways() -> None:
    agent, relay = established()
    assert (agent.peer, relay.peer, relay.own_id) == (RELAY.id, AGENT.id, RELAY.id)
    assert received(relay, sealed(agent, b"question")) == [b"question"]
    assert received(agent, sealed(relay, b"x" * 200_000)) == [b"x" * 200_000]


def test_content_is_not_readable_in_between() -> None:
    agent, relay = established()
    assert b"secret" not in sealed(agent, b"secret" * 100)
    assert b"secret" not in sealed(relay, b"secret" * 100)


def test_an_unknown_recipient_is_told_so() -> None:
    agent, relay = NodeSession.initiate(AGENT, OTHER.id), acceptor()
    (hello,) = agent.take_outgoing()
    with pytest.raises(NoSuchTunnelError):
        relay.receive(memoryview(hello))
    (reject,) = relay.take_outgoing()
    with pytest.raises(RemoteProtocolError, match=UNKNOWN_NODE):
        agent.receive(memoryview(reject))


def test_another_node_cannot_answer_in_place_of_the_relay() -> None:
    agent = NodeSession.initiate(AGENT, RELAY.id)
    (hello,) = agent.take_outgoing()
    session = hello[24:44]
    with pytest.raises(NotAllowedError, match=str(OTHER.id)):
        agent.receive(memoryview(encode_hello(AGENT.id.digest, session, OTHER.certificate)))


def test_another_node_cannot_use_the_certificate_of_the_relay() -> None:
    impostor = Identity(RELAY.id, RELAY.certificate, OTHER.pem)
    agent, relay = NodeSession.initiate(AGENT, RELAY.id), acceptor(impostor)
    with pytest.raises(RemoteProtocolError, match="TLS"):
        exchange(agent, relay)
    assert not agent.established


def test_another_node_cannot_use_the_certificate_of_the_agent() -> None:
    impostor = Identity(AGENT.id, AGENT.certificate, OTHER.pem)
    agent, relay = NodeSession.initiate(impostor, RELAY.id), acceptor()
    with pytest.raises(RemoteProtocolError, match="TLS"):
        exchange(agent, relay)
    assert not relay.established


def test_reordered_envelopes_are_put_in_order_and_repeated_ones_dropped() -> None:
    agent, relay = established()
    first, second = sealed(agent, b"first"), sealed(agent, b"second")
    assert received(relay, second) == []
    assert received(relay, first) == [b"first", b"second"]
    assert received(relay, first) == []
    assert received(relay, second) == []


@pytest.mark.parametrize("at", [35, 36, -8], ids=["length", "TLS header", "ciphertext"])
def test_an_altered_envelope_ends_the_session(at: int) -> None:
    agent, relay = established()
    envelope = bytearray(sealed(agent, b"message"))
    envelope[at] ^= 1
    with pytest.raises(RemoteProtocolError):
        relay.receive(memoryview(envelope))


def test_a_repeated_envelope_with_the_next_number_ends_the_session() -> None:
    agent, relay = established()
    envelope = bytearray(sealed(agent, b"message"))
    assert received(relay, bytes(envelope)) == [b"message"]
    envelope[31] += 1  # the last octet of the number
    with pytest.raises(RemoteProtocolError, match="TLS"):
        relay.receive(memoryview(envelope))


def test_an_envelope_of_an_earlier_session_is_refused() -> None:
    agent, _ = established()
    _, relay = established()
    with pytest.raises(RemoteProtocolError, match="another session"):
        relay.receive(memoryview(sealed(agent, b"message")))


def test_what_is_sent_back_to_its_sender_is_refused() -> None:
    """The two directions have different keys."""
    agent, _ = established()
    sealed(agent, b"")  # so that the number would fit
    envelope = bytearray(sealed(agent, b"message"))
    envelope[24:32] = (1).to_bytes(8, "big")
    with pytest.raises(RemoteProtocolError, match="TLS"):
        agent.receive(memoryview(envelope))


def test_mistakes_before_the_handshake() -> None:
    hello = encode_hello(RELAY.id.digest, bytes(20), AGENT.certificate)
    for envelopes in (
        [encode_records(bytes(20), 0, b"x")],
        [hello, hello],
        [hello, encode_records(bytes(20), 0, b"")],
        [hello, encode_records(bytes(20), 0, b"no TLS at all")],
        [encode_hello(RELAY.id.digest, bytes(20), b"no certificate")],
    ):
        session = acceptor()
        for envelope in envelopes[:-1]:
            session.receive(memoryview(envelope))
        with pytest.raises(RemoteProtocolError):
            session.receive(memoryview(envelopes[-1]))


def test_a_hello_for_another_node_is_refused_by_an_initiator() -> None:
    agent = NodeSession.initiate(AGENT, RELAY.id)
    (hello,) = agent.take_outgoing()
    for recipient, session in ((NodeId(bytes(20)).digest, hello[24:44]), (AGENT.id.digest, bytes(20))):
        with pytest.raises(RemoteProtocolError):
            agent.receive(memoryview(encode_hello(recipient, session, RELAY.certificate)))
