"""A pin: the one certificate, at every connection, before anything is said."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme

from tests.support.control import running_server
from tests.support.people import PATIENCE
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
def papers(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority's certificate as ca.pem, a relay's as relay.pem, for the names that connections use."""
    folder = tmp_path_factory.mktemp("papers")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "stranger.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "relay.key")
    issued.cert_chain_pems[0].write_to_path(folder / "relay.pem")
    return folder


def server_context(papers: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers / "relay.pem", papers / "relay.key")
    context.maximum_version = version
    return context


def pin_of(papers: Path) -> str:
    """Computed here by other means than in the code under test."""
    der = ssl.PEM_cert_to_DER_cert((papers / "relay.pem").read_text())
    return "sha256:" + hashlib.sha256(der).hexdigest()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_the_right_pin_needs_no_authority_and_no_name(papers: Path, version: ssl.TLSVersion) -> None:
    tls = contexts.client_tls_context(pin=pin_of(papers))
    async with running_server(tls=server_context(papers, version)) as server:
        for host in ("127.0.0.1", "localhost"):  # the certificate has the first name only
            async with connect(f"tls://{host}:{server.endpoint.port}", tls=tls) as client:
                assert (await client.call("echo", "hi")).text == "hi"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_wrong_pin_ends_every_connection_and_names_both(papers: Path, version: ssl.TLSVersion) -> None:
    tls = contexts.client_tls_context(pin=OTHER)
    async with running_server(tls=server_context(papers, version)) as server:
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as caught:
                async with connect(str(server.endpoint), tls=tls):
                    pass
            assert pin_of(papers) in str(caught.value)
            assert OTHER in str(caught.value)
            assert caught.value.exit_status == 76
        assert server.script.requests == []


async def test_a_pin_that_differs_in_its_last_digit_is_another(papers: Path) -> None:
    pin = pin_of(papers)
    other = pin[:-1] + ("0" if pin[-1] != "0" else "1")
    async with running_server(tls=server_context(papers)) as server:
        with pytest.raises(RemoteProtocolError):
            async with connect(str(server.endpoint), tls=contexts.client_tls_context(pin=other)):
                pass


async def test_nothing_is_said_to_the_holder_of_another_certificate(papers: Path) -> None:
    """With TLS 1.3 not even the handshake is finished, so our own certificate stays here."""
    with trio.fail_after(PATIENCE):
        assert await outcome(papers, contexts.client_tls_context(pin=OTHER)) == "the handshake failed"
        assert await outcome(papers, contexts.client_tls_context(pin=pin_of(papers))) == "shaken hands"


async def test_of_several_pins_any_will_do_so_that_a_certificate_can_be_changed(papers: Path) -> None:
    both = contexts.client_tls_context(pin=f"{OTHER},{pin_of(papers).upper()}")
    assert await outcome(papers, both) == "shaken hands"
    neither = contexts.client_tls_context(pin=f"{OTHER},sha256:{64 * '0'}")
    assert await outcome(papers, neither) == "the handshake failed"


async def outcome(papers: Path, tls: ssl.SSLContext) -> str:
    """What a relay sees of one connection that is made with this context."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    seen = []

    async def serve() -> None:
        async with await listener.accept() as transport:  # which a broken SSLStream would not close
            try:
                await trio.SSLStream(transport, server_context(papers), server_side=True).do_handshake()
                seen.append("shaken hands")
            except trio.BrokenResourceError:
                seen.append("the handshake failed")

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises((RemoteProtocolError, RelayUnreachableError)):
            async with connect(f"tls://127.0.0.1:{listener.socket.getsockname()[1]}", tls=tls):
                pass
    return seen[0]


async def test_beside_an_authority_both_must_hold(papers: Path) -> None:
    def tls(ca: str, pin: str) -> ssl.SSLContext:
        return contexts.client_tls_context(papers / ca, pin=pin)

    async with running_server(tls=server_context(papers)) as server:
        async with connect(str(server.endpoint), tls=tls("ca.pem", pin_of(papers))) as client:
            await client.call("echo")
        with pytest.raises(RemoteProtocolError, match="not the pinned"):
            async with connect(str(server.endpoint), tls=tls("ca.pem", OTHER)):
                pass
        with pytest.raises(RelayUnreachableError, match="does not hold"):
            async with connect(str(server.endpoint), tls=tls("stranger.pem", pin_of(papers))):
                pass


async def test_without_both_a_relay_is_refused_unless_nothing_is_to_be_checked(papers: Path) -> None:
    async with running_server(tls=server_context(papers)) as server:
        with pytest.raises(RelayUnreachableError, match=r"does not hold.*--ca.*--pin"):
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
def test_what_is_no_fingerprint_is_refused(make: Make, text: str) -> None:
    with pytest.raises(UsageError, match="not a fingerprint of the form"):
        make(text)


@pytest.mark.parametrize("text", ["", ",", f"{OTHER},", f",{OTHER}", f"{OTHER} {OTHER}", f"{OTHER},sha256:00"])
def test_one_bad_pin_spoils_them_all(text: str) -> None:
    with pytest.raises(UsageError, match="not a fingerprint of the form"):
        parse_pins(text)
