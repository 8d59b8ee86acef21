"""The client's side of authentication, against a real control server and against impostors."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trustme

from tests.support.control import running_server
from tests.support.credentials import SECRET, authenticator_of, credential
from tests.support.scripted_relays import GREETING, fake_relay, saying, stay
from tunneld.client import connect
from tunneld.config.certificates import TlsFiles
from tunneld.config.credentials import Credential
from tunneld.errors import NotAllowedError, RefusedError, RemoteProtocolError
from tunneld.tls import contexts
from tunneld.wire import scram

ALICE = credential("alice")
SCRAM_GREETING = GREETING.replace(b"auth=none", b"auth=scram-sha-256")


async def test_with_the_secret_calls_work() -> None:
    async with (
        running_server(authenticator=authenticator_of(ALICE)) as server,
        connect(str(server.endpoint), credential=("alice", SECRET)) as client,
    ):
        assert (await client.call("echo", "hi")).text == "hi"
        assert [caller.grant for caller in server.script.callers] == [ALICE.grant]


@pytest.mark.parametrize(("name", "secret"), [("alice", "wrong"), ("nobody", SECRET)])
async def test_a_wrong_secret_is_refused_by_name(name: str, secret: str) -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server:
        with pytest.raises(RefusedError, match=f"refused the credential '{name}': authentication failed") as caught:
            async with connect(str(server.endpoint), credential=(name, secret)):
                pass
        assert caught.value.reply_code == "not-allowed"
        assert secret not in str(caught.value)


async def test_a_relay_that_requires_a_credential_is_reported_with_the_options() -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server:
        with pytest.raises(
            NotAllowedError, match="requires authentication: use --credential NAME and --secret-file FILE"
        ):
            async with connect(str(server.endpoint)):
                pass


async def test_a_given_credential_is_used_or_the_connection_ends() -> None:
    """Otherwise an impostor would only have to say that it needs none."""
    async with running_server() as server:
        with pytest.raises(NotAllowedError, match="cannot prove that it knows the secret of 'alice'"):
            async with connect(str(server.endpoint), credential=("alice", SECRET)):
                pass


@pytest.mark.parametrize("method", [b"certificate", b"password", b""])
async def test_a_method_that_does_not_prove_the_secret_is_refused(method: bytes) -> None:
    greeting = GREETING.replace(b"auth=none", b"auth=" + method)
    async with fake_relay(saying(greeting, then=stay)) as relay:
        with pytest.raises(NotAllowedError):
            async with connect(str(relay), credential=("alice", SECRET)):
                pass


def impostor(answers: Sequence[bytes]) -> object:
    """A relay that knows the protocol, but not the secret."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(SCRAM_GREETING)
        first = bytes(await stream.receive_some(4096)).split()[2].decode()
        nonce = scram.Hello.parse(scram.decode(first)).nonce.encode()
        for answer in answers:
            message = scram.encode(answer.replace(b"NONCE", nonce)).encode()
            await stream.send_all(b"OK " + message + b"\n")
            await stream.receive_some(4096)

    return serve


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([b"r=NONCExyz,s=c2FsdA==,i=4096", b"v=" + b"A" * 43 + b"="], "it does not know the secret"),
        ([b"r=NONCExyz,s=c2FsdA==,i=4096", b""], "it does not know the secret"),
        ([b"r=NONCExyz,s=c2FsdA==,i=1"], "it asks for 1 iterations"),
        ([b"r=NONCE,s=c2FsdA==,i=4096"], "another nonce"),
        ([b"r=other,s=c2FsdA==,i=4096"], "another nonce"),
        ([b"\xff"], "not UTF-8"),
    ],
)
async def test_a_relay_that_does_not_know_the_secret_is_an_impostor(answers: Sequence[bytes], reason: str) -> None:
    async with fake_relay(impostor(answers)) as relay:  # type: ignore[arg-type]
        with pytest.raises(RemoteProtocolError, match="prove that it knows the secret of 'alice'") as caught:
            async with connect(str(relay), credential=("alice", SECRET)):
                pass
        assert reason in str(caught.value)


async def test_an_answer_that_is_not_base64_is_invalid() -> None:
    async with fake_relay(saying(SCRAM_GREETING, b"OK !!\n", then=stay)) as relay:
        with pytest.raises(RemoteProtocolError, match="invalid message: the message is not in base64"):
            async with connect(str(relay), credential=("alice", SECRET)):
                pass


async def test_the_secret_is_never_sent() -> None:
    recorded = bytearray()

    async def serve(stream: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(real.endpoint.host, real.endpoint.port) as connection:

            async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                async for chunk in source:
                    recorded.extend(chunk)
                    await sink.send_all(chunk)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, connection, stream)
                await copy(stream, connection)
                nursery.cancel_scope.cancel()

    async with (
        running_server(authenticator=authenticator_of(ALICE)) as real,
        fake_relay(serve) as between,
        connect(str(between), credential=("alice", SECRET)) as client,
    ):
        assert (await client.call("echo", "hi")).text == "hi"
    words = recorded.split()
    decoded = b"".join(scram.decode(word.decode()) for word in words if len(word) > 40)
    assert b"n=alice" in decoded
    assert SECRET.encode() not in bytes(recorded) + decoded


# Mutual TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of an authority, a relay and two clients."""
    folder = tmp_path_factory.mktemp("pki")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("127.0.0.1", "bob", "carol"):
        issued = authority.issue_cert(name)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


def fingerprint(certificate: Path) -> str:
    """As `openssl x509 -fingerprint -sha256` prints it."""
    return "sha256:" + hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest().upper()


async def test_a_certificate_names_the_credential(pki: Path) -> None:
    bob = Credential(name="bob", certificate=fingerprint(pki / "bob.pem"))
    tls = contexts.server_tls_context(
        TlsFiles(certificate=pki / "127.0.0.1.pem", key=pki / "127.0.0.1.key", client_ca=pki / "ca.pem")
    )
    async with running_server(tls=tls, authenticator=authenticator_of(bob, ALICE)) as server:
        bob_tls = contexts.client_tls_context(pki / "ca.pem", pki / "bob.pem", pki / "bob.key")
        async with connect(str(server.endpoint), tls=bob_tls) as client:
            await client.call("echo")
        carol_tls = contexts.client_tls_context(pki / "ca.pem", pki / "carol.pem", pki / "carol.key")
        with pytest.raises(NotAllowedError, match="requires authentication"):
            async with connect(str(server.endpoint), tls=carol_tls):
                pass
        async with connect(str(server.endpoint), tls=carol_tls, credential=("alice", SECRET)) as client:
            await client.call("echo")
        assert [caller.grant.name for caller in server.script.callers if caller.grant] == ["bob", "alice"]
        assert server.script.callers[0].owner.startswith("bob@127.0.0.1:")
