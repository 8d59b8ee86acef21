"""Web protocols through a tunnel: nginx and hypercorn as local servers, curl and a WebSocket client as visitors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.exposed import Exposed, exposed
from tests.support.peers import PATIENCE, read_all, read_exactly
from tests.support.pki import Pki
from tests.support.programs import free_port, listening, program, run

MIB = 1 << 20
ASSETS = 60
BROWSERS = 50
CROWD = 500
Find = Callable[[str], str]

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    server {{ listen 127.0.0.1:{port} {words}; root {folder}/www; {more} }}
}}
"""


@asynccontextmanager
async def nginx(folder: Path, find: Find, words: str = "", more: str = "") -> AsyncIterator[str]:
    """Run nginx with the files in `folder`/www, and yield its port."""
    port, configuration = await free_port(), folder / "nginx.conf"
    configuration.write_text(NGINX.format(folder=folder, port=port, words=words, more=more))
    async with listening([find("nginx"), "-c", str(configuration)], port):
        yield str(port)


@asynccontextmanager
async def application(label: str = "") -> AsyncIterator[str]:
    """Run `tests.support.page`, and yield its port."""
    port = await free_port()
    command = [sys.executable, "-m", "hypercorn", "--worker-class", "trio", "--workers", "0"]
    environment = os.environ | {"LABEL": label}
    async with listening([*command, "--bind", f"127.0.0.1:{port}", "tests.support.page:app"], port, env=environment):
        yield str(port)


def assets(folder: Path) -> list[bytes]:
    """Write files of a few KiB each, all different, to `folder`/www; returns their contents."""
    (folder / "www").mkdir()
    contents = [hashlib.sha256(b"%d" % number).digest() * 300 for number in range(ASSETS)]
    for number, content in enumerate(contents):
        (folder / "www" / f"asset{number}").write_bytes(content)
    return contents


def gathered(folder: Path) -> list[bytes]:
    """The files that curl saved, in the order of the assets."""
    return [(folder / f"got{number}").read_bytes() for number in range(ASSETS)]


def curl(find: Find, *words: str) -> list[str]:
    return [find("curl"), "-sS", "--fail", "--max-time", "60", *words]


async def test_requests_share_a_connection_as_they_do_without_a_tunnel(
    tmp_path: Path, program_path: Find, way: str
) -> None:
    contents = assets(tmp_path)
    async with nginx(tmp_path, program_path) as web, exposed(way, tmp_path, web) as server:
        written = ["-o", f"{tmp_path}/got#1", "-w", "%{num_connects} %{http_version}\n"]
        said = await run(curl(program_path, *written, server.url(f"/asset[0-{ASSETS - 1}]")))
        assert said.splitlines() == ["1 1.1"] + ["0 1.1"] * (ASSETS - 1)
        assert gathered(tmp_path) == contents


async def test_http_2_end_to_end(tmp_path: Path, program_path: Find, way: str) -> None:
    """The tunnel does not terminate TLS: the browser gets the certificate of the hidden server."""
    contents, pki = assets(tmp_path), Pki.issue(tmp_path / "web")
    certificate = f"ssl_certificate {pki.folder}/relay.pem; ssl_certificate_key {pki.folder}/relay.key;"
    hidden = nginx(tmp_path, program_path, "ssl http2", certificate)
    async with hidden as web, exposed(way, tmp_path, web) as server:
        speak = ["--http2", "--cacert", f"{pki.folder}/ca.pem", "--parallel", "--parallel-max", str(ASSETS)]
        written = ["-o", f"{tmp_path}/got#1", "-w", "%{http_version}\n"]
        said = await run(curl(program_path, *speak, *written, server.url(f"/asset[0-{ASSETS - 1}]", "https")))
        assert said.split() == ["2"] * ASSETS
        assert gathered(tmp_path) == contents


async def test_fifty_browsers_load_a_page_with_sixty_assets(tmp_path: Path, program_path: Find, way: str) -> None:
    """Six connections each at the same time: more than a carrier holds, so some wait until the agent has made more."""
    contents = assets(tmp_path)

    async def browse(number: int, url: str) -> None:
        (tmp_path / f"{number}").mkdir()
        written = ["--create-dirs", "-o", f"{tmp_path}/{number}/got#1", "-w", "%{http_code}\n"]
        said = await run(curl(program_path, "--parallel", "--parallel-immediate", "--parallel-max", "6", *written, url))
        assert said.split() == ["200"] * ASSETS
        assert gathered(tmp_path / f"{number}") == contents

    async with (
        nginx(tmp_path, program_path) as web,
        exposed(way, tmp_path, web) as server,
        trio.open_nursery() as nursery,
    ):
        for number in range(BROWSERS):
            nursery.start_soon(browse, number, server.url(f"/asset[0-{ASSETS - 1}]"))


async def test_five_hundred_simultaneous_visitors(tmp_path: Path, program_path: Find, way: str) -> None:
    """No visitor is refused, and all are connected before the first one sends anything."""
    contents = assets(tmp_path)

    async def visit(server: Exposed) -> None:
        async with await trio.open_tcp_stream(server.address.host, server.address.port) as visitor:
            await visitor.send_all(b"GET /asset0 HTTP/1.0\r\n\r\n")
            answer = await read_all(visitor)
            assert answer.endswith(contents[0])

    async with nginx(tmp_path, program_path) as web, exposed(way, tmp_path, web) as server:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for _ in range(CROWD):
                    nursery.start_soon(visit, server)


async def test_http_2_without_tls(tmp_path: Path, program_path: Find, way: str) -> None:
    """One request only: this curl loses an h2c connection at the second one, with or without a tunnel."""
    contents = assets(tmp_path)
    async with nginx(tmp_path, program_path, "http2") as web, exposed(way, tmp_path, web) as server:
        written = ["-o", f"{tmp_path}/got", "-w", "%{http_version}"]
        assert await run(curl(program_path, "--http2-prior-knowledge", *written, server.url("/asset0"))) == "2"
        assert (tmp_path / "got").read_bytes() == contents[0]


@pytest.mark.parametrize("mebibytes", [64, pytest.param(1024, marks=pytest.mark.big)])
async def test_a_large_download_arrives_unchanged(tmp_path: Path, program_path: Find, way: str, mebibytes: int) -> None:
    (tmp_path / "www").mkdir()
    digest = hashlib.sha256()
    with (tmp_path / "www" / "large").open("wb") as file:
        for number in range(mebibytes):
            block = hashlib.sha256(b"%d" % number).digest() * (MIB // 32)
            digest.update(block)
            file.write(block)
    async with nginx(tmp_path, program_path) as web, exposed(way, tmp_path, web) as server:
        words = ["-o", f"{tmp_path}/got", "--max-time", "600"]
        await run(curl(program_path, *words, server.url("/large")), seconds=600)
    with (tmp_path / "got").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == digest.digest()


async def test_an_upload_is_answered_when_it_is_complete(tmp_path: Path, program_path: Find, way: str) -> None:
    content = hashlib.sha256(b"upload").digest() * (16 * MIB // 32)
    (tmp_path / "upload").write_bytes(content)
    async with application() as web, exposed(way, tmp_path, web) as server:
        said = await run(curl(program_path, "--upload-file", f"{tmp_path}/upload", server.url("/sha256")))
        assert said == hashlib.sha256(content).hexdigest()


async def test_server_sent_events_are_not_buffered(tmp_path: Path, program_path: Find, way: str) -> None:
    """Each event is made when the previous one was read, so a relay that buffers would wait for ever."""
    async with application() as web, exposed(way, tmp_path, web) as server:
        reader = curl(program_path, "--no-buffer", server.url("/events"))
        async with program(reader, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for number in range(10):
                expected = b"data: %d\n\n" % number
                with trio.fail_after(PATIENCE):
                    assert await read_exactly(process.stdout, len(expected)) == expected
                await run(curl(program_path, "--request", "POST", server.url("/tick")))


async def test_a_websocket_answers_each_message(tmp_path: Path, way: str) -> None:
    async with application() as web, exposed(way, tmp_path, web) as server:
        client = [sys.executable, "-m", "websockets", server.url("/echo", "ws")]
        async with program(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            heard = b""
            for word in (b"one", b"two", b"three"):
                await process.stdin.send_all(word + b"\n")
                with trio.fail_after(PATIENCE):
                    while b"< " + word not in heard:
                        heard += await process.stdout.receive_some()
