"""The control port with TLS: certificates of trustme, the clients of Trio and of OpenSSL."""

from __future__ import annotations

import random
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trustme
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.control import LineClient, Server, running_server
from tests.support.peers import connect, is_dropped, read_all
from tunneld.config.certificates import TlsFiles
from tunneld.config.schema import ControlSettings
from tunneld.control.connection import FINAL_REPLY_TIMEOUT, LineConnection
from tunneld.tls import contexts

LONG = 1e6
"""Timeout of a test in seconds of a mock clock, which the test advances by hand."""


@dataclass(frozen=True)
class Certificates:
    """A CA, server contexts with its certificate, and client certificates of this CA and of a foreign one."""

    ca: Path
    server: ssl.SSLContext
    mutual: ssl.SSLContext
    client: Path  # certificate and key in one file
    foreign_client: Path

    def context(self, certificate: Path | None = None) -> ssl.SSLContext:
        """The context of a client that trusts this CA and presents `certificate`, if any."""
        return contexts.client_tls_context(self.ca, certificate)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ca, foreign = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    server = ca.issue_cert("localhost", "127.0.0.1")
    server.cert_chain_pems[0].write_to_path(folder / "server.pem")
    server.private_key_pem.write_to_path(folder / "server.key")
    ca.issue_cert("agent@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
    foreign.issue_cert("agent@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "foreign_client.pem")
    tls = TlsFiles(certificate=folder / "server.pem", key=folder / "server.key")
    return Certificates(
        folder / "ca.pem",
        contexts.server_tls_context(tls),
        contexts.server_tls_context(tls.model_copy(update={"client_ca": folder / "ca.pem"})),
        folder / "client.pem",
        folder / "foreign_client.pem",
    )


@asynccontextmanager
async def encrypted(server: Server, context: ssl.SSLContext) -> AsyncIterator[LineClient]:
    """A client with TLS that has not read the greeting yet."""
    stream = trio.SSLStream(await connect(server.endpoint), context, server_hostname="127.0.0.1")
    try:
        yield LineClient(stream)
    finally:
        await trio.aclose_forcefully(stream)


async def is_serving(server: Server, context: ssl.SSLContext) -> bool:
    async with encrypted(server, context) as client:
        return (await client.read_line()).startswith("OK tunneld") and await client.request("echo hi") == "OK hi"


async def is_refused(client: LineClient) -> bool:
    """Whether TLS fails; with TLS 1.3 a client learns so only after its own part of the handshake."""
    try:
        await client.send("echo hi")
        await client.stream.receive_some(1)
    except trio.BrokenResourceError:
        return True
    return False


async def test_requests_are_answered_in_tls(certificates: Certificates) -> None:
    async with running_server(tls=certificates.server) as server, encrypted(server, certificates.context()) as client:
        assert (await client.read_line()).endswith(" auth=none")
        assert await client.request("list 5000") == "OK 5000 tunnels"
        await client.send("watch")
        assert await client.read_line() == "* event=watching"
        assert await client.request("") == "OK watched"


async def test_the_server_sends_close_notify(certificates: Certificates) -> None:
    async with running_server(tls=certificates.server) as server, encrypted(server, certificates.context()) as client:
        await client.send("quit")
        assert len([await client.read_line(), await client.read_line()]) == 2
        assert await client.stream.receive_some(1) == b""  # without close_notify this raises BrokenResourceError


async def test_a_certificate_of_the_ca_is_accepted(certificates: Certificates) -> None:
    context = certificates.context(certificates.client)
    async with running_server(tls=certificates.mutual) as server, encrypted(server, context) as client:
        assert (await client.read_line()).endswith(" auth=certificate")


@pytest.mark.parametrize("shown", ["nothing", "foreign"])
async def test_without_a_certificate_of_the_ca_a_client_is_refused(certificates: Certificates, shown: str) -> None:
    context = certificates.context(certificates.foreign_client if shown == "foreign" else None)
    async with running_server(tls=certificates.mutual) as server:
        with capture_logs() as logs:
            async with encrypted(server, context) as client:
                assert await is_refused(client)
            assert await is_serving(server, certificates.context(certificates.client))
        assert [request.args for request in server.script.requests] == [("hi",)]  # is_serving's
        (failure,) = [log for log in logs if log["log_level"] == "info"]
        assert failure["event"] == "TLS handshake on control connection failed"
        assert failure["peer"].startswith("127.0.0.1:")
        assert "exc_info" not in failure


async def test_slow_handshakes_delay_no_other_client_and_time_out(
    certificates: Certificates, mock_clock: MockClock
) -> None:
    async with running_server(ControlSettings(handshake_timeout=10.0), certificates.server, timeout=LONG) as server:
        slow = [await connect(server.endpoint) for _ in range(20)]
        for number, stream in enumerate(slow):
            await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00"[:number])
        assert await is_serving(server, certificates.context())
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(11)
        for stream in slow:
            assert await is_dropped(stream)
            await stream.aclose()


async def test_connections_in_a_handshake_count_towards_the_limit(certificates: Certificates) -> None:
    async with (
        running_server(ControlSettings(max_connections=1), certificates.server) as server,
        await connect(server.endpoint),
    ):
        second = await connect(server.endpoint)
        assert (await LineClient(second).read_line()).startswith("ERR limit 1 of 1 control connections")
        await second.aclose()


async def test_plain_text_on_the_tls_port_gets_an_error(certificates: Certificates) -> None:
    async with running_server(tls=certificates.server) as server, await connect(server.endpoint) as stream:
        await stream.send_all(b"list\n")
        assert await LineClient(stream).read_all() == [
            "ERR protocol this port speaks TLS; use tls:// or openssl s_client"
        ]
        assert server.script.requests == []


@pytest.mark.parametrize("seed", range(5))
async def test_garbage_instead_of_a_handshake_ends_only_its_connection(certificates: Certificates, seed: int) -> None:
    async with running_server(tls=certificates.server) as server:
        with capture_logs() as logs:
            async with await connect(server.endpoint) as stream:
                await stream.send_all(b"\x16" + random.Random(seed).randbytes(20_000))
                with suppress(trio.BrokenResourceError):  # an alert, then perhaps a reset because of unread input
                    await read_all(stream)
        assert {log["log_level"] for log in logs} <= {"debug", "info"}
        assert await is_serving(server, certificates.context())


async def test_garbage_inside_tls_ends_only_its_connection(certificates: Certificates) -> None:
    async with running_server(tls=certificates.server) as server:
        async with encrypted(server, certificates.context()) as client:
            await client.read_line()
            await client.send(b"x" * 300_000)
            assert (await client.read_line()).startswith("ERR protocol line is longer than")
        assert await is_serving(server, certificates.context())


async def test_old_tls_is_refused(certificates: Certificates) -> None:
    old = certificates.context()
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    async with running_server(tls=certificates.server) as server, encrypted(server, old) as client:
        assert await is_refused(client)


Program = Callable[[str], str]


async def s_client(program: str, server: Server, *arguments: str, script: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run OpenSSL's client as a person would; it stays until the server closes the connection."""
    address = f"{server.endpoint.host}:{server.endpoint.port}"
    return await trio.run_process(
        [program, "s_client", "-connect", address, "-quiet", "-verify_return_error", *arguments],
        stdin=script,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )


async def test_by_hand_with_openssl(certificates: Certificates, program_path: Program) -> None:
    openssl = program_path("openssl")
    async with running_server(tls=certificates.server) as server:
        done = await s_client(openssl, server, "-CAfile", str(certificates.ca), script=b"echo hi\nquit\n")
        assert done.stdout.decode().splitlines()[-2:] == ["OK hi", "OK bye"]


async def test_openssl_with_a_certificate_is_accepted(certificates: Certificates, program_path: Program) -> None:
    openssl = program_path("openssl")
    arguments = ["-CAfile", str(certificates.ca), "-cert", str(certificates.client), "-key", str(certificates.client)]
    async with running_server(tls=certificates.mutual) as server:
        done = await s_client(openssl, server, *arguments, script=b"echo hi\nquit\n")
        assert done.stdout.decode().splitlines()[-2:] == ["OK hi", "OK bye"]


@pytest.mark.parametrize("shown", ["nothing", "foreign"])
async def test_openssl_without_the_right_certificate_is_refused(
    certificates: Certificates, program_path: Program, shown: str
) -> None:
    openssl = program_path("openssl")
    foreign = (
        ["-cert", str(certificates.foreign_client), "-key", str(certificates.foreign_client)]
        if shown == "foreign"
        else []
    )
    async with running_server(tls=certificates.mutual) as server:
        done = await s_client(openssl, server, "-CAfile", str(certificates.ca), *foreign, script=b"echo hi\nquit\n")
        assert done.stdout == b""
        assert done.returncode != 0
        assert server.script.requests == []


class SlowStream(trio.abc.Stream):
    """A stream that sends in `count` steps, as TLS does, or never."""

    def __init__(self, count: float) -> None:
        self.count = count
        self.sent: list[bytes] = []
        self.started = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.started.set()
        if self.count == float("inf"):
            await trio.sleep_forever()
        for _ in range(int(self.count)):
            await trio.lowlevel.checkpoint()
        self.sent.append(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return b""

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def send_while_cancelled(stream: SlowStream) -> None:
    async def cancel() -> None:
        await stream.started.wait()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        with trio.CancelScope() as scope:
            await LineConnection(stream, ControlSettings).send(b"OK stopping\n")


async def test_a_reply_in_progress_is_sent_despite_cancellation() -> None:
    """`tunnel restart` over TLS: its own request cancels the session."""
    stream = SlowStream(5)
    await send_while_cancelled(stream)
    assert stream.sent == [b"OK stopping\n"]


async def test_a_reply_that_the_peer_does_not_read_is_dropped_after_a_timeout(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.01
    began = trio.current_time()
    await send_while_cancelled(SlowStream(float("inf")))
    assert trio.current_time() - began == pytest.approx(FINAL_REPLY_TIMEOUT, abs=0.1)
