"""Pins: every connection accepts only the pinned certificate, before anything is sent."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme

from tests.support.control import running_server
from tests.support.peers import PATIENCE
from tunneld.client import connect
from tunneld.errors import RelayUnreachableError, RemoteProtocolError, UsageError
from tunneld.tls import contexts
from tunneld.tls.pins import PinnedContext, fingerprint, parse_pin, parse_pins

HEX = "0123456789abcdef" * 4
OTHER = f"sha256:{HEX}"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificates(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the authority's certificate (ca.pem), another authority's, and a relay's (relay.pem)."""
    folder = tmp_path_factory.mktemp("certificates")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other-ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "relay.key")
    issued.cert_chain_pems[0].write_to_path(folder / "relay.pem")
    return folder


def server_context(certificates: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "relay.pem", certificates / "relay.key")
    context.maximum_version = version
    return context


def pin_of(certificates: Path) -> str:
    """The pin, computed without the code under test."""
    der = ssl.PEM_cert_to_DER_cert((certificates / "relay.pem").read_text())
    return "sha256:" + hashlib.sha256(der).hexdigest()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_the_right_pin_needs_neither_authority_nor_name(certificates: Path, version: ssl.TLSVersion) -> None:
    tls = contexts.client_tls_context(pin=pin_of(certificates))
    async with running_server(tls=server_context(certificates, version)) as server:
        for host in ("127.0.0.1", "localhost"):  # the certificate has the first name only
            async with connect(f"tls://{host}:{server.endpoint.port}", tls=tls) as client:
                assert (await client.call("echo", "hi")).text == "hi"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_wrong_pin_fails_every_connection_and_the_error_names_both(
    certificates: Path, version: ssl.TLSVersion
) -> None:
    tls = contexts.client_tls_context(pin=OTHER)
    async with running_server(tls=server_context(certificates, version)) as server:
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as caught:
                async with connect(str(server.endpoint), tls=tls):
                    pass
            assert pin_of(certificates) in str(caught.value)
            assert OTHER in str(caught.value)
            assert caught.value.exit_status == 76
        assert server.script.requests == []


async def test_a_pin_that_differs_in_its_last_digit_is_wrong(certificates: Path) -> None:
    pin = pin_of(certificates)
    other = pin[:-1] + ("0" if pin[-1] != "0" else "1")
    async with running_server(tls=server_context(certificates)) as server:
        with pytest.raises(RemoteProtocolError):
            async with connect(str(server.endpoint), tls=contexts.client_tls_context(pin=other)):
                pass


async def test_nothing_is_sent_to_a_relay_with_another_certificate(certificates: Path) -> None:
    """With TLS 1.3 not even the handshake is finished, so our own certificate is not sent."""
    with trio.fail_after(PATIENCE):
        assert await outcome(certificates, contexts.client_tls_context(pin=OTHER)) == "the handshake failed"
        assert (
            await outcome(certificates, contexts.client_tls_context(pin=pin_of(certificates)))
            == "the handshake succeeded"
        )


async def test_one_of_several_pins_suffices_so_that_a_certificate_can_be_replaced(certificates: Path) -> None:
    both = contexts.client_tls_context(pin=f"{OTHER},{pin_of(certificates).upper()}")
    assert await outcome(certificates, both) == "the handshake succeeded"
    neither = contexts.client_tls_context(pin=f"{OTHER},sha256:{64 * '0'}")
    assert await outcome(certificates, neither) == "the handshake failed"


async def outcome(certificates: Path, tls: ssl.SSLContext) -> str:
    """The relay's view of one connection that is made with this context."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    seen = []

    async def serve() -> None:
        async with await listener.accept() as transport:  # a broken SSLStream would not close it
            try:
                await trio.SSLStream(transport, server_context(certificates), server_side=True).do_handshake()
                seen.append("the handshake succeeded")
            except trio.BrokenResourceError:
                seen.append("the handshake failed")

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises((RemoteProtocolError, RelayUnreachableError)):
            async with connect(f"tls://127.0.0.1:{listener.socket.getsockname()[1]}", tls=tls):
                pass
    return seen[0]


async def test_with_an_authority_and_a_pin_both_are_checked(certificates: Path) -> None:
    def tls(ca: str, pin: str) -> ssl.SSLContext:
        return contexts.client_tls_context(certificates / ca, pin=pin)

    async with running_server(tls=server_context(certificates)) as server:
        async with connect(str(server.endpoint), tls=tls("ca.pem", pin_of(certificates))) as client:
            await client.call("echo")
        with pytest.raises(RemoteProtocolError, match="does not match --pin"):
            async with connect(str(server.endpoint), tls=tls("ca.pem", OTHER)):
                pass
        with pytest.raises(RelayUnreachableError, match="certificate verification failed"):
            async with connect(str(server.endpoint), tls=tls("other-ca.pem", pin_of(certificates))):
                pass


async def test_without_both_a_relay_is_refused_unless_verification_is_off(certificates: Path) -> None:
    async with running_server(tls=server_context(certificates)) as server:
        with pytest.raises(RelayUnreachableError, match=r"certificate verification failed.*--pin.*--ca"):
            async with connect(str(server.endpoint), tls=contexts.client_tls_context()):
                pass
        async with connect(str(server.endpoint), tls=contexts.unverified_tls_context()) as client:
            await client.call("echo")


def test_a_pin_may_be_written_as_openssl_prints_it() -> None:
    colons = ":".join(HEX[at : at + 2] for at in range(0, 64, 2))
    assert {parse_pin(text) for text in (OTHER, OTHER.upper(), f"sha256:{colons}")} == {OTHER}
    assert fingerprint(b"") == f"sha256:{hashlib.sha256().hexdigest()}"


Make = Callable[[str], object]


@pytest.mark.parametrize("text", ["", HEX, f"sha1:{HEX}", "sha256:", f"sha256:{HEX}0", f"sha256:{HEX[1:]}g"])
@pytest.mark.parametrize("make", [parse_pin, PinnedContext.make, lambda text: contexts.client_tls_context(pin=text)])
def test_anything_but_a_fingerprint_is_refused(make: Make, text: str) -> None:
    with pytest.raises(UsageError, match="not a fingerprint of the form"):
        make(text)


@pytest.mark.parametrize("text", ["", ",", f"{OTHER},", f",{OTHER}", f"{OTHER} {OTHER}", f"{OTHER},sha256:00"])
def test_one_invalid_pin_makes_the_list_invalid(text: str) -> None:
    with pytest.raises(UsageError, match="not a fingerprint of the form"):
        parse_pins(text)
