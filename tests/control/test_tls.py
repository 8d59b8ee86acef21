"""The control socket in TLS: trustme's certificates, Trio's client, and OpenSSL's own."""

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
from tests.support.people import connect, is_dropped, read_all
from tunneld.config.schema import ControlSettings, TlsFiles
from tunneld.control.connection import FINAL_REPLY_TIMEOUT, LineConnection
from tunneld.tls import contexts

LONG = 1e6
"""Seconds of a clock that the test moves by hand."""


@dataclass(frozen=True)
class Papers:
    """One authority, a server with its certificate, and clients of this authority and of a foreign one."""

    ca: Path
    server: ssl.SSLContext
    mutual: ssl.SSLContext
    client: Path  # certificate and key in one file
    foreigner: Path

    def context(self, certificate: Path | None = None) -> ssl.SSLContext:
        """What a client uses that believes this authority and shows a certificate, if any."""
        return contexts.client_tls_context(self.ca, certificate)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("papers")
    ca, foreign = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    server = ca.issue_cert("localhost", "127.0.0.1")
    server.cert_chain_pems[0].write_to_path(folder / "server.pem")
    server.private_key_pem.write_to_path(folder / "server.key")
    ca.issue_cert("agent@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
    foreign.issue_cert("agent@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "foreigner.pem")
    tls = TlsFiles(certificate=folder / "server.pem", key=folder / "server.key")
    return Papers(
        folder / "ca.pem",
        contexts.server_tls_context(tls),
        contexts.server_tls_context(tls.model_copy(update={"client_ca": folder / "ca.pem"})),
        folder / "client.pem",
        folder / "foreigner.pem",
    )


@asynccontextmanager
async def encrypted(server: Server, context: ssl.SSLContext) -> AsyncIterator[LineClient]:
    """Somebody who speaks TLS and has not heard the greeting yet."""
    stream = trio.SSLStream(await connect(server.endpoint), context, server_hostname="127.0.0.1")
    try:
        yield LineClient(stream)
    finally:
        await trio.aclose_forcefully(stream)


async def is_serving(server: Server, context: ssl.SSLContext) -> bool:
    async with encrypted(server, context) as client:
        return (await client.read_line()).startswith("OK tunneld") and await client.request("echo hi") == "OK hi"


async def is_shut_out(client: LineClient) -> bool:
    """Whether TLS fails; with TLS 1.3 a client hears so only after its own part of the handshake."""
    try:
        await client.send("echo hi")
        await client.stream.receive_some(1)
    except trio.BrokenResourceError:
        return True
    return False


async def test_requests_are_answered_in_tls(papers: Papers) -> None:
    async with running_server(tls=papers.server) as server, encrypted(server, papers.context()) as client:
        assert (await client.read_line()).endswith("protocol=1 auth=none")
        assert await client.request("list 5000") == "OK 5000 tunnels"
        await client.send("watch")
        assert await client.read_line() == "* event=watching"
        assert await client.request("") == "OK watched"


async def test_the_end_is_said_as_tls_wants_it(papers: Papers) -> None:
    async with running_server(tls=papers.server) as server, encrypted(server, papers.context()) as client:
        await client.send("quit")
        assert len([await client.read_line(), await client.read_line()]) == 2
        assert await client.stream.receive_some(1) == b""  # without close_notify this raises BrokenResourceError


async def test_a_certificate_of_our_authority_lets_in(papers: Papers) -> None:
    context = papers.context(papers.client)
    async with running_server(tls=papers.mutual) as server, encrypted(server, context) as client:
        assert (await client.read_line()).endswith("protocol=1 auth=certificate")


@pytest.mark.parametrize("who", ["nobody", "foreigner"])
async def test_without_a_certificate_of_our_authority_nobody_gets_in(papers: Papers, who: str) -> None:
    context = papers.context(papers.foreigner if who == "foreigner" else None)
    async with running_server(tls=papers.mutual) as server:
        with capture_logs() as logs:
            async with encrypted(server, context) as client:
                assert await is_shut_out(client)
            assert await is_serving(server, papers.context(papers.client))
        assert [request.args for request in server.script.requests] == [("hi",)]  # is_serving's
        (failure,) = [log for log in logs if log["log_level"] == "info"]
        assert failure["event"] == "TLS handshake on control connection failed"
        assert failure["peer"].startswith("127.0.0.1:")
        assert "exc_info" not in failure


async def test_slow_handshakes_hold_nobody_up_and_end(papers: Papers, mock_clock: MockClock) -> None:
    async with running_server(ControlSettings(handshake_timeout=10.0), papers.server, patience=LONG) as server:
        slow = [await connect(server.endpoint) for _ in range(20)]
        for number, stream in enumerate(slow):
            await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00"[:number])
        assert await is_serving(server, papers.context())
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(11)
        for stream in slow:
            assert await is_dropped(stream)
            await stream.aclose()


async def test_connections_in_a_handshake_count(papers: Papers) -> None:
    async with (
        running_server(ControlSettings(max_connections=1), papers.server) as server,
        await connect(server.endpoint),
    ):
        second = await connect(server.endpoint)
        assert (await LineClient(second).read_line()).startswith("ERR limit 1 of 1 control connections")
        await second.aclose()


async def test_plain_text_on_the_tls_port_is_told_so(papers: Papers) -> None:
    async with running_server(tls=papers.server) as server, await connect(server.endpoint) as stream:
        await stream.send_all(b"list\n")
        assert await LineClient(stream).read_all() == [
            "ERR protocol this port speaks TLS; use tls:// or openssl s_client"
        ]
        assert server.script.requests == []


@pytest.mark.parametrize("seed", range(5))
async def test_garbage_instead_of_a_handshake_costs_only_its_connection(papers: Papers, seed: int) -> None:
    async with running_server(tls=papers.server) as server:
        with capture_logs() as logs:
            async with await connect(server.endpoint) as stream:
                await stream.send_all(b"\x16" + random.Random(seed).randbytes(20_000))
                with suppress(trio.BrokenResourceError):  # an alert, then perhaps a reset, for nobody read on
                    await read_all(stream)
        assert {log["log_level"] for log in logs} <= {"debug", "info"}
        assert await is_serving(server, papers.context())


async def test_garbage_inside_tls_costs_only_its_connection(papers: Papers) -> None:
    async with running_server(tls=papers.server) as server:
        async with encrypted(server, papers.context()) as client:
            await client.read_line()
            await client.send(b"x" * 300_000)
            assert (await client.read_line()).startswith("ERR protocol line is longer than")
        assert await is_serving(server, papers.context())


async def test_old_tls_is_refused(papers: Papers) -> None:
    old = papers.context()
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    async with running_server(tls=papers.server) as server, encrypted(server, old) as client:
        assert await is_shut_out(client)


Program = Callable[[str], str]


async def s_client(program: str, server: Server, *arguments: str, script: bytes) -> subprocess.CompletedProcess[bytes]:
    """OpenSSL's client, as a client would use it; it stays until the server hangs up."""
    place = f"{server.endpoint.host}:{server.endpoint.port}"
    return await trio.run_process(
        [program, "s_client", "-connect", place, "-quiet", "-verify_return_error", *arguments],
        stdin=script,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )


async def test_by_hand_with_openssl(papers: Papers, program_path: Program) -> None:
    openssl = program_path("openssl")
    async with running_server(tls=papers.server) as server:
        done = await s_client(openssl, server, "-CAfile", str(papers.ca), script=b"echo hi\nquit\n")
        assert done.stdout.decode().splitlines()[-2:] == ["OK hi", "OK bye"]


async def test_openssl_with_a_certificate_gets_in(papers: Papers, program_path: Program) -> None:
    openssl = program_path("openssl")
    arguments = ["-CAfile", str(papers.ca), "-cert", str(papers.client), "-key", str(papers.client)]
    async with running_server(tls=papers.mutual) as server:
        done = await s_client(openssl, server, *arguments, script=b"echo hi\nquit\n")
        assert done.stdout.decode().splitlines()[-2:] == ["OK hi", "OK bye"]


@pytest.mark.parametrize("shown", ["nothing", "foreign"])
async def test_openssl_without_the_right_certificate_does_not(
    papers: Papers, program_path: Program, shown: str
) -> None:
    openssl = program_path("openssl")
    foreign = ["-cert", str(papers.foreigner), "-key", str(papers.foreigner)] if shown == "foreign" else []
    async with running_server(tls=papers.mutual) as server:
        done = await s_client(openssl, server, "-CAfile", str(papers.ca), *foreign, script=b"echo hi\nquit\n")
        assert done.stdout == b""
        assert done.returncode != 0
        assert server.script.requests == []


class Steps(trio.abc.Stream):
    """Sends in several steps, as TLS does, or never."""

    def __init__(self, count: float) -> None:
        self.count = count
        self.sent: list[bytes] = []
        self.begun = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.begun.set()
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


async def send_while_the_end_begins(stream: Steps) -> None:
    async def end() -> None:
        await stream.begun.wait()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        with trio.CancelScope() as scope:
            await LineConnection(stream, ControlSettings).send(b"OK stopping\n")


async def test_an_answer_that_is_on_its_way_as_the_end_begins_gets_out() -> None:
    """`tunnel restart` asks over TLS, and its own request is what cancels the conversation."""
    stream = Steps(5)
    await send_while_the_end_begins(stream)
    assert stream.sent == [b"OK stopping\n"]


async def test_but_nobody_is_waited_for_who_does_not_take_it(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.01
    began = trio.current_time()
    await send_while_the_end_begins(Steps(float("inf")))
    assert trio.current_time() - began == pytest.approx(FINAL_REPLY_TIMEOUT, abs=0.1)
