"""Real clients (curl, wget, ab, requests, websockets) reach real servers (nginx, hypercorn) by a host name."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import requests
import trio
from websockets.sync.client import connect as websocket

from tests.e2e.test_web import ASSETS, MIB, application, assets, curl, gathered, nginx
from tests.support.named import DOMAIN, Named, ResponseReader, named
from tests.support.peers import PATIENCE, read_exactly
from tests.support.pki import Pki
from tests.support.programs import program, run
from tunneld.net.endpoint import Endpoint

Find = Callable[[str], str]
HOST = f"blog.{DOMAIN}"
MORE = """
location = /empty { return 204; }
location = /moved { return 301 http://127.0.0.1/elsewhere; }
location /upload { client_max_body_size 0; return 200; }
"""


@pytest.fixture(params=["webmux", "tcp"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def site_of(
    server: AbstractAsyncContextManager[str], folder: Path, backend: str, *options: str
) -> AsyncIterator[Named]:
    """Run a server, and a relay with a name for it."""
    async with server as port, named(folder, {"blog": port}, *options, way=backend) as site:
        yield site


def by_name(find: Find, site: Named, *words: str) -> list[str]:
    """The command line of curl that finds the relay under the name."""
    return curl(find, "--resolve", f"{HOST}:{site.port}:127.0.0.1", *words)


def url(site: Named, path: str, scheme: str = "http") -> str:
    return f"{scheme}://{HOST}:{site.port}{path}"


async def test_curl_keeps_its_connection_for_all_assets(tmp_path: Path, program_path: Find, backend: str) -> None:
    contents = assets(tmp_path)
    async with site_of(nginx(tmp_path, program_path), tmp_path, backend) as site:
        written = ["-o", f"{tmp_path}/got#1", "-w", "%{num_connects} %{http_version}\n"]
        said = await run(by_name(program_path, site, *written, url(site, f"/asset[0-{ASSETS - 1}]")))
        assert said.splitlines() == ["1 1.1"] + ["0 1.1"] * (ASSETS - 1)
        assert gathered(tmp_path) == contents
        said = await run(by_name(program_path, site, "--head", url(site, "/asset0")))
        assert f"Content-Length: {len(contents[0])}" in said
        (etag,) = [line for line in said.splitlines() if line.startswith("ETag")]
        condition = ["-w", "%{http_code}", "-H", f"If-None-Match: {etag.partition(' ')[2]}"]
        assert await run(by_name(program_path, site, *condition, url(site, "/asset0"))) == "304"


@pytest.mark.parametrize("words", [[], ["--http1.0"], ["-H", "Connection: close"]])
async def test_every_kind_of_answer(tmp_path: Path, program_path: Find, words: list[str]) -> None:
    """Several on one connection: a client that misread the end of one would not understand the next."""
    contents = assets(tmp_path)
    async with site_of(nginx(tmp_path, program_path, more=MORE), tmp_path, "webmux") as site:
        paths = ["/asset0", "/empty", "/nothing", "/moved", "/asset1"]
        command = curl(
            program_path, "--resolve", f"{HOST}:{site.port}:127.0.0.1", "-w", "%{stderr}%{http_code}\n", *words
        )
        command.remove("--fail")
        for path in paths:
            command += ["-o", f"{tmp_path}/got{path[-1]}", url(site, path)]
        done = await trio.run_process(command, capture_stderr=True)
        assert done.stderr.split() == [b"200", b"204", b"404", b"301", b"200"]
        assert (tmp_path / "got0").read_bytes() == contents[0]
        assert (tmp_path / "got1").read_bytes() == contents[1]


async def test_a_client_that_prefers_http_2_gets_http_1(tmp_path: Path, program_path: Find) -> None:
    """With TLS it asks for h2 by ALPN, without it for an upgrade to h2c; one that insists is refused with a status."""
    contents, pki = assets(tmp_path), Pki.issue(tmp_path / "pki", HOST)
    files = f'[[certificate]]\ncertificate = "{pki.folder}/relay.pem"\nkey = "{pki.folder}/relay.key"\n'
    async with (
        nginx(tmp_path, program_path) as port,
        named(tmp_path, {}, words=f'https = "127.0.0.1:0"\n{files}') as site,
        site.expose("blog", port, "--plain-http", "allow"),
    ):
        https = Endpoint.parse((await site.relay.wait_logged("names-https listens"))["uri"]).port
        written = ["-o", f"{tmp_path}/got#1", "-w", "%{num_connects} %{http_version}\n"]
        for scheme, number in (("http", site.port), ("https", https)):
            secure = ["--cacert", f"{pki.folder}/ca.pem", "--resolve", f"{HOST}:{number}:127.0.0.1"]
            address = f"{scheme}://{HOST}:{number}/asset[0-{ASSETS - 1}]"
            command = curl(program_path, *secure, *written, "--http2", address)
            assert (await run(command)).splitlines() == ["1 1.1"] + ["0 1.1"] * (ASSETS - 1)
            assert gathered(tmp_path) == contents
        visitor = await site.connect()
        await visitor.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        response = await ResponseReader(visitor).response()
        assert response is not None
        assert response.status == 505
        await visitor.aclose()


async def test_curl_speaks_http_2_where_that_is_on(tmp_path: Path, program_path: Find) -> None:
    contents, pki = assets(tmp_path), Pki.issue(tmp_path / "pki", HOST, f"web.{DOMAIN}")
    files = f'[[certificate]]\ncertificate = "{pki.folder}/relay.pem"\nkey = "{pki.folder}/relay.key"\n'
    (tmp_path / "upload").write_bytes(content := b"".join(contents) * 4)
    async with (
        nginx(tmp_path, program_path) as static,
        application() as web,
        named(tmp_path, {}, words=f'https = "127.0.0.1:0"\nhttp2 = true\n{files}') as site,
        site.expose("blog", static),
        site.expose("web", web),
    ):
        https = Endpoint.parse((await site.relay.wait_logged("names-https listens"))["uri"]).port
        names = [word for name in (HOST, f"web.{DOMAIN}") for word in ("--resolve", f"{name}:{https}:127.0.0.1")]
        speak = ["--http2", "--cacert", f"{pki.folder}/ca.pem", *names]
        written = ["-o", f"{tmp_path}/got#1", "-w", "%{http_version}\n"]
        parallel = ["--parallel", "--parallel-max", str(ASSETS), *written]
        address = f"https://{HOST}:{https}/asset[0-{ASSETS - 1}]"
        assert (await run(curl(program_path, *speak, *parallel, address))).split() == ["2"] * ASSETS
        assert gathered(tmp_path) == contents
        upload = ["--upload-file", f"{tmp_path}/upload", f"https://web.{DOMAIN}:{https}/sha256"]
        digest = hashlib.sha256(content).hexdigest()
        for words in ([], ["-H", "Transfer-Encoding: chunked"]):  # of known length, and not
            assert await run(curl(program_path, *speak, *words, *upload)) == digest


@pytest.mark.parametrize("mebibytes", [50, pytest.param(1024, marks=pytest.mark.big)])
@pytest.mark.parametrize("words", [["--expect100-timeout", "30"], ["-H", "Transfer-Encoding: chunked"]])
async def test_an_upload_arrives_unchanged(
    tmp_path: Path, program_path: Find, backend: str, mebibytes: int, words: list[str]
) -> None:
    """With `--expect100-timeout`, curl would wait for half a minute if 100 Continue did not reach it."""
    digest = hashlib.sha256()
    with (tmp_path / "upload").open("wb") as file:
        for number in range(mebibytes):
            block = hashlib.sha256(b"%d" % number).digest() * (MIB // 32)
            digest.update(block)
            file.write(block)
    async with site_of(application(), tmp_path, backend) as site:
        words = [*words, "--upload-file", f"{tmp_path}/upload", "--max-time", "600"]
        assert await run(by_name(program_path, site, *words, url(site, "/sha256")), seconds=600) == digest.hexdigest()


@pytest.mark.parametrize("mebibytes", [50, pytest.param(1024, marks=pytest.mark.big)])
async def test_a_download_arrives_unchanged(tmp_path: Path, program_path: Find, backend: str, mebibytes: int) -> None:
    (tmp_path / "www").mkdir()
    digest = hashlib.sha256()
    with (tmp_path / "www" / "large").open("wb") as file:
        for number in range(mebibytes):
            block = hashlib.sha256(b"%d" % number).digest() * (MIB // 32)
            digest.update(block)
            file.write(block)
    async with site_of(nginx(tmp_path, program_path), tmp_path, backend) as site:
        words = ["-o", f"{tmp_path}/got", "--max-time", "600"]
        await run(by_name(program_path, site, *words, url(site, "/large")), seconds=600)
    with (tmp_path / "got").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == digest.digest()


async def test_server_sent_events_are_not_buffered(tmp_path: Path, program_path: Find, backend: str) -> None:
    """Each event is made when the previous one was read, so a relay that buffers would wait for ever."""
    async with site_of(application(), tmp_path, backend) as site:
        reader = by_name(program_path, site, "--no-buffer", url(site, "/events"))
        async with program(reader, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for number in range(10):
                expected = b"data: %d\n\n" % number
                with trio.fail_after(PATIENCE):
                    assert await read_exactly(process.stdout, len(expected)) == expected
                await run(by_name(program_path, site, "--request", "POST", url(site, "/tick")))


async def test_a_websocket_passes_messages_of_all_sizes(tmp_path: Path, backend: str) -> None:
    async with site_of(application(), tmp_path, backend) as site:

        def talk() -> None:
            with (
                socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as connection,
                websocket(url(site, "/echo", "ws"), sock=connection, max_size=None) as client,
            ):
                for size in (0, 1, 125, 126, 70_000, MIB):
                    message = "x" * size
                    client.send(message)
                    assert client.recv() == message

        await trio.to_thread.run_sync(talk)


async def test_wget_ab_and_requests(tmp_path: Path, program_path: Find) -> None:
    contents = assets(tmp_path)
    async with site_of(nginx(tmp_path, program_path), tmp_path, "webmux") as site:
        header = f"Host: {HOST}"
        await run([program_path("wget"), "-q", "-O", f"{tmp_path}/got", "--header", header, site.url("/asset0")])
        assert (tmp_path / "got").read_bytes() == contents[0]

        def browse() -> None:
            with requests.Session() as session:
                for number in range(20):
                    answer = session.get(site.url(f"/asset{number}"), headers={"Host": HOST}, timeout=PATIENCE)
                    assert answer.content == contents[number]

        await trio.to_thread.run_sync(browse)
        said = await run([program_path("ab"), "-k", "-n", "500", "-c", "20", "-H", header, site.url("/asset0")])
        assert "Failed requests:        0" in said
        assert "Keep-Alive requests:    500" in said


async def test_a_hundred_pipelined_requests(tmp_path: Path, program_path: Find, backend: str) -> None:
    """All of them are sent before the first answer is read, and the visitor half-closes behind the last."""
    contents = assets(tmp_path)
    async with site_of(nginx(tmp_path, program_path), tmp_path, backend) as site, await site.connect() as visitor:
        head = partial("GET /asset{} HTTP/1.1\r\nHost: {}\r\n\r\n".format)
        await visitor.send_all("".join(head(number % ASSETS, HOST) for number in range(100)).encode())
        await visitor.send_eof()
        reader = ResponseReader(visitor)
        for number in range(100):
            response = await reader.response()
            assert response is not None
            assert response.body == contents[number % ASSETS]
        assert await reader.ended()
